"""The encoder's model and tokenizer as SentenceEncoder uses them: texts to windows of tokens, windows to vectors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from torch import nn

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import EncoderConfig
from nemo_lrpo.rewards.encoder_files import refuse_code
from nemo_lrpo.rewards.encoding_queue import BatchRule, TokenisedText, Tokens
from nemo_lrpo.rewards.packed_layers import pack_layers, prepare_shapes

_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, ImportError, SafetensorError)


# Packed layers are compiled for numbers of rows: multiples of the first, for texts longer than a batch of the second.
_ROWS, _LONG_ROWS = 16, 64


@dataclass(frozen=True)
class Prefix:
    """What stands before every text of one role. text: the prompt, may be empty. tokens: the tokenizer's special tokens
    and the prompt, as they open every window. group: length to be left out of pooling, 0 for none."""

    text: str
    tokens: tuple[int, ...]
    group: int


class EncoderModel:
    """Loads the model that `config` names; raises ConfigError where that fails. `tokenise` may be called by several
    threads at once, `encode` by `workers` threads, each of which has called `begin_worker`."""

    rule: BatchRule
    """How to cut batches of windows for `encode`."""
    workers: int
    """PyTorch's threads on a CPU: batches go side by side on a core each, so that no layer waits for the slowest core;
    else 1."""

    def __init__(self, config: EncoderConfig):
        self.device = torch.device(_device(config.device))
        bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and self.device.type == "cuda")
        self.modules = _load(config, self.device, bfloat16)
        first = self.modules[0]
        if not isinstance(first, Transformer):
            raise ConfigError(
                f"encoder.path={config.path!r}: its first module is {type(first).__name__}; accepted: Transformer."
            )
        if hasattr(first.auto_model.config, "reference_compile"):
            # ModernBERT would compile itself on a GPU, again for every new shape.
            first.auto_model.config.reference_compile = False
        if bfloat16:
            # Parameters alone: buffers hold the frequencies of positions, which bfloat16 would spoil.
            for parameter in first.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        packed = self.device.type == "cpu" and not bfloat16 and pack_layers(self.modules)
        self.rule = _batch_rule(config, self.device.type, packed, _positions(first.auto_model))
        self.workers = torch.get_num_threads() if packed else 1
        if packed:
            # On a worker's number of cores: oneDNN compiles for it, too.
            with ThreadPoolExecutor(1, initializer=self.begin_worker) as worker:
                worker.submit(prepare_shapes, self.modules, self.rule).result()
        self._tokenizer = first.tokenizer
        self._lower_case = first.do_lower_case
        self._pad = self._tokenizer.pad_token_id or 0
        self._opening, self._closing = self._specials()
        self.prefixes = {
            role: self._prefix(f"encoder.{role}_prompt", prompt)
            for role, prompt in (("reference", config.reference_prompt), ("response", config.response_prompt))
        }
        self._window = self._find_window(config)
        self._max_chunks = config.max_chunks if config.long_texts == "chunk" else 1

    def begin_worker(self) -> None:
        """Before a thread's first `encode`: where there are several, each computes on one core."""
        if self.workers > 1:
            torch.get_num_threads()  # PyTorch chooses a number for this thread at its first call
            # This thread's, for OpenMP and MKL: were it OpenMP's alone, attention would split its small products over
            # all cores. It is also that of threads yet to begin, for which another thread puts it back.
            torch.set_num_threads(1)
            with ThreadPoolExecutor(1) as other:
                other.submit(torch.set_num_threads, self.workers).result()

    def tokenise(self, texts: Sequence[str], prefixes: Sequence[Prefix]) -> list[TokenisedText]:
        """Each text whole, or in windows that each have the prefix and the closing special tokens, weighted by the
        tokens of the text itself. A text to which the tokenizer gives no token gets one without weight."""
        # Tokenizers refuse lone surrogates, which a decoder cut in the middle of a character may leave.
        whole = [
            (prefix.text + text).strip().encode("utf-8", "replace").decode("utf-8")
            for text, prefix in zip(texts, prefixes, strict=True)
        ]
        return [self._cut((prefix, text), ids, prefix) for text, ids, prefix in zip(texts, self._ids(whole), prefixes)]

    def encode(self, windows: Sequence[Tokens], width: int, group: int = 0) -> NDArray[np.float32]:
        """Embeddings float32 [B, D] of B windows, padded to `width` tokens, as the model's last module leaves them.
        group: of their prefix."""
        ids = np.full((len(windows), width), self._pad, dtype=np.int64)
        mask = np.zeros((len(windows), width), dtype=np.int64)
        # On the right whatever the tokenizer's side: positions then do not depend on the longest of the batch.
        for row, window in enumerate(windows):
            ids[row, : len(window)] = window
            mask[row, : len(window)] = 1
        features = {
            "input_ids": torch.from_numpy(ids).to(self.device),
            "attention_mask": torch.from_numpy(mask).to(self.device),
        }
        if group:
            features["prompt_length"] = group
        with torch.inference_mode():
            transformer, *others = self.modules
            features = transformer(features)
            features["token_embeddings"] = features["token_embeddings"].float()
            for module in others:
                features = module(features)
            return features["sentence_embedding"].float().cpu().numpy()

    def _ids(self, texts: Sequence[str]) -> list[Tokens]:
        if self._lower_case:
            texts = [text.lower() for text in texts]
        found = self._tokenizer(
            list(texts), padding=False, truncation=False, verbose=False, return_attention_mask=False
        )
        return [np.array(row, dtype=np.int32) for row in found["input_ids"]]

    def _cut(self, key: Hashable, ids: Tokens, prefix: Prefix) -> TokenisedText:
        if not len(ids):
            return TokenisedText(key, [np.array([self._pad], dtype=np.int32)], [0], group=prefix.group)
        start, end = len(prefix.tokens), len(ids) - len(self._closing)
        if self._window is None or len(ids) <= self._window:
            return TokenisedText(key, [ids], [1], group=prefix.group)
        room = self._window - start - len(self._closing)
        chunks = [ids[at : min(at + room, end)] for at in range(start, end, room)]
        windows = [
            np.concatenate([np.array(prefix.tokens, np.int32), chunk, np.array(self._closing, np.int32)])
            for chunk in chunks[: self._max_chunks]
        ]
        weights = [len(chunk) for chunk in chunks[: self._max_chunks]]
        return TokenisedText(key, windows, weights, len(chunks) > self._max_chunks, prefix.group)

    def _specials(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Special tokens before and after a text."""
        found = self._tokenizer("1", return_special_tokens_mask=True)
        ids, special = found["input_ids"], found["special_tokens_mask"]
        inner = [place for place, flag in enumerate(special) if not flag]
        first, last = (inner[0], inner[-1] + 1) if inner else (len(ids), len(ids))
        return tuple(ids[:first]), tuple(ids[last:])

    def _prefix(self, key: str, setting: str | None) -> Prefix:
        prompts = self.modules.prompts
        name = self.modules.default_prompt_name if setting is None else setting
        if name is None:
            text = ""
        elif name in prompts:
            text = prompts[name]
        elif ":" in name or " " in name:
            text = name
        else:
            known = ", ".join(prompts) or "none (the model has no prompts)"
            raise ConfigError(
                f"{key}={name!r} is no prompt of the model; accepted: {known}, or a text with a colon or a space."
            )
        if not text:
            return Prefix("", self._opening, 0)
        tokens = self._ids([text.strip()])[0]
        tokens = tuple(tokens[: len(tokens) - len(self._closing)].tolist())
        pooled = all(module.include_prompt for module in self.modules if isinstance(module, Pooling))
        return Prefix(text, tokens, 0 if pooled else len(tokens))

    def _find_window(self, config: EncoderConfig) -> int | None:
        """Tokens of a window, special tokens and prompt included; None for a model without a limit."""
        limits = [self.modules.get_max_seq_length(), _positions(self.modules[0].auto_model)]
        limit = min((limit for limit in limits if limit is not None), default=None)
        if config.max_tokens is not None and limit is not None and config.max_tokens > limit:
            raise ConfigError(f"encoder.max_tokens={config.max_tokens} exceeds the encoder's own limit, {limit}.")
        window = config.max_tokens or limit
        for role, prefix in self.prefixes.items():
            taken = len(prefix.tokens) + len(self._closing)
            if window is not None and window <= taken:
                raise ConfigError(
                    f"encoder.max_tokens={window} leaves no room for text beside the {taken} tokens of "
                    f"encoder.{role}_prompt and the special tokens; give more."
                )
        return window


def _batch_rule(config: EncoderConfig, device: str, packed: bool, widest: int | None) -> BatchRule:
    # CPU: measured on two cores, where larger batches leave the cache; GPU: estimates.
    tokens, overhead = (768 if packed else 2048, 16) if device == "cpu" else (16384, 1024)
    rows = (_ROWS, _LONG_ROWS) if packed else (1, 1)
    return BatchRule(config.batch_tokens or tokens, overhead, *rows, widest)


def _load(config: EncoderConfig, device: torch.device, bfloat16: bool) -> SentenceTransformer:
    refuse_code("encoder.path", Path(str(config.path)))

    def load(**model_options: str) -> SentenceTransformer:
        return SentenceTransformer(
            str(config.path),
            device=str(device),
            local_files_only=True,
            trust_remote_code=False,
            # The weights' own type, or the one that the model's files ask for, decides nothing.
            model_kwargs={"use_safetensors": True, "torch_dtype": torch.float32, **model_options},
        ).eval()

    try:
        model = load()
        attention = getattr(getattr(model[0], "auto_model", None), "config", None)
        if not bfloat16 and getattr(attention, "_attn_implementation", "") == "flash_attention_2":
            # ModernBERT takes it where it is installed; it computes in bfloat16 whatever the weights are.
            model = load(attn_implementation="sdpa")
    except _LOADING_ERRORS as error:
        raise ConfigError(
            f"encoder.path={config.path!r} cannot be loaded on device {config.device!r}: {error}"
        ) from error
    return model


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _positions(model: nn.Module) -> int | None:
    """Positions that `model` has embeddings for; None where it computes them. RoBERTa's begin after the padding's."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return None
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
