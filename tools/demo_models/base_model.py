"""The demo's base model: a small Llama that knows different facts in different languages.

Trained from nothing on the world's base examples: a question in one language, a tag, an answer in the language of the
tag. Some examples answer in another language or with a wrong value, so that the model that results follows the tag
mostly, and knows what it knows with some doubt: what reinforcement learning is there to improve.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nemo_lrpo.config.data import PromptConfig
from nemo_lrpo.data.prompts import PromptRenderer

Row = tuple[str, str, str, str]
"""(question, its language, the language asked for, answer)"""
Rows = Callable[[int, bool], Iterable[Row]]
"""(epoch, noisy) -> the rows of an epoch: `noisy` as the world is taught, else without wrong languages and values."""


@dataclass(frozen=True)
class BaseModelRecipe:
    """Size and training of the base model; the defaults are what the demo ships.

    Most steps see rows without noise, from which facts are learnt several times as fast; the last `noisy_share` of
    them see the noise, which moves the model's certainty and leaves its knowledge.
    """

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    groups: int = 2
    ffn: int = 384
    context: int = 256
    steps: int = 800
    batch_tokens: int = 2048
    noisy_share: float = 0.165
    matrix_lr: float = 7e-3
    other_lr: float = 2e-2
    warmup: float = 0.05


@dataclass(frozen=True)
class Example:
    """A prompt of the base model with one answer, as token ids; the answer ends with the end token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class ExampleEncoder:
    """Rows as token ids, in the form in which the policy is asked (style "tag"); each text is tokenised once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._renderer = PromptRenderer(tokenizer, PromptConfig(style="tag"))
        self._ids: dict[str, tuple[int, ...]] = {}

    def prompts(self, questions: Sequence[tuple[str, str]]) -> list[tuple[int, ...]]:
        """Token ids of (question, language asked for) pairs, up to where the answer starts."""
        return self._encode([self._renderer.text(question, language) for question, language in questions])

    def __call__(self, rows: Iterable[Row]) -> list[Example]:
        rows = list(rows)
        prompts = self.prompts([(question, language) for question, _, language, _ in rows])
        answers = self._encode([answer for *_, answer in rows])
        end = (self._tokenizer.eos_token_id,)
        return [Example(prompt, answer + end) for prompt, answer in zip(prompts, answers, strict=True)]

    def _encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        fresh = [text for text in dict.fromkeys(texts) if text not in self._ids]
        if fresh:
            ids = self._tokenizer(fresh, add_special_tokens=False)["input_ids"]
            self._ids.update(zip(fresh, map(tuple, ids), strict=True))
        return [self._ids[text] for text in texts]


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: BaseModelRecipe, seed: int) -> LlamaForCausalLM:
    """A randomly initialised model, a function of the seed alone."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.groups,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # On short sequences and a CPU, plain products beat the fused attention kernel's backward pass by far.
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def batches(
    examples: Sequence[Example], batch_tokens: int, rng: np.random.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of like length in random order: tokens int64 [B, S], labels int64 [B, S] (-100 outside the answer).

    A batch holds `batch_tokens` tokens at most, padding included, or a single example. Padding comes after the end,
    where causal attention never looks.
    """
    lengths = np.array([len(example.prompt) + len(example.answer) for example in examples])
    groups: list[list[int]] = []
    width = 0
    # The noise mixes neighbours in length anew each time.
    for index in np.argsort(lengths + rng.uniform(0, 4, len(examples)), kind="stable"):
        width = max(width, lengths[index])
        if not groups or width * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
            width = lengths[index]
        groups[-1].append(index)
    for group in rng.permutation(len(groups)):
        rows = [examples[index] for index in groups[group]]
        width = max(len(row.prompt) + len(row.answer) for row in rows)
        tokens = np.zeros((len(rows), width), dtype=np.int64)
        labels = np.full((len(rows), width), -100, dtype=np.int64)
        for index, row in enumerate(rows):
            end = len(row.prompt) + len(row.answer)
            tokens[index, :end] = row.prompt + row.answer
            labels[index, len(row.prompt) : end] = row.answer
        yield torch.from_numpy(tokens), torch.from_numpy(labels)


def answer_loss(model: LlamaForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens; the output layer runs on those positions only."""
    hidden = model.model(tokens, use_cache=False).last_hidden_state[:, :-1]
    target = labels[:, 1:]
    chosen = target != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[chosen]).float(), target[chosen])


def keep_memory() -> None:
    """Let the C library keep freed memory: fetching zeroed pages anew for each activation takes a third of a step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def fast_matmul() -> torch.autocast:
    """bf16 products where the processor has instructions for them (several times as fast), float32 elsewhere."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Rows,
    recipe: BaseModelRecipe,
    seed: int,
    line: int = 0,
) -> float:
    """Train on `rows`; returns seconds. The seed decides the outcome. line: of the progress bar on the screen.

    Muon for the matrices of the layers (about half as many steps as AdamW on this task), AdamW for the rest; linear
    warm-up, cosine decay.
    """
    keep_memory()
    started = time.perf_counter()
    layers = [p for name, p in model.named_parameters() if p.ndim > 1 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim > 1 and ".layers." in name)]
    optimizers = [
        torch.optim.Muon(layers, lr=recipe.matrix_lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    rate = warmup_cosine(recipe.steps, recipe.warmup)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    encoder = ExampleEncoder(tokenizer)

    def stream(noisy: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for epoch in itertools.count():
            yield from batches(
                encoder(rows(epoch, noisy)), recipe.batch_tokens, np.random.default_rng((seed, epoch, noisy))
            )

    clean_steps = round(recipe.steps * (1 - recipe.noisy_share))
    source = itertools.chain(itertools.islice(stream(False), clean_steps), stream(True))
    model.train()
    smooth = None
    with tqdm(total=recipe.steps, desc="base model", unit="step", mininterval=1.0, position=line) as bar:
        for tokens, labels in itertools.islice(source, recipe.steps):
            with fast_matmul():
                loss = answer_loss(model, tokens, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            value = loss.item()
            smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
            bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            bar.update()
    model.eval()
    return time.perf_counter() - started


def warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Learning-rate factor of a step: linear over the first `warmup` share, then a cosine down to a thousandth."""
    rising = max(1, round(steps * warmup))
    return lambda step: min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) + 1e-3)


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Sequence[int]],
    temperature: float = 1.0,
    max_new_tokens: int = 48,
    seed: int = 0,
    batch_size: int = 256,
) -> list[str]:
    """Answers to token-id prompts, in order. temperature 0 takes the likeliest token."""
    generator = torch.Generator().manual_seed(seed)
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    start = 0
    while start < len(order):
        # One length a batch: no padding, and so no mask.
        length = len(prompts[order[start]])
        rows = [row for row in order[start : start + batch_size] if len(prompts[row]) == length]
        start += len(rows)
        tokens = torch.tensor([list(prompts[row]) for row in rows])
        cache, answers = None, []
        alive = torch.ones(len(rows), dtype=torch.bool)
        for _ in range(max_new_tokens):
            with fast_matmul():
                output = model(tokens, past_key_values=cache, use_cache=True, num_logits_to_keep=1)
            logits, cache = output.logits[:, -1].float(), output.past_key_values
            if temperature > 0:
                tokens = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                tokens = logits.argmax(-1, keepdim=True)
            tokens[~alive] = tokenizer.eos_token_id
            answers.append(tokens)
            alive &= tokens[:, 0] != tokenizer.eos_token_id
            if not alive.any():
                break
        for row, ids in zip(rows, torch.cat(answers, dim=1).tolist(), strict=True):
            texts[row] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return texts
