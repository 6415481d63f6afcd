"""Cosine similarity of answers under a sentence encoder, the s of r_qual."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.scoring import EncoderConfig

_IDENTITY_SUFFIXES = (".safetensors", ".json", ".txt", ".model")


def encoder_identity(path: str | Path, max_tokens: int | None = None) -> str:
    """`sha256:...` over names and contents of the encoder's weights, tokenizer and configuration, and over `max_tokens`
    where set: two encoders that share it give the same embeddings. Model cards and hidden files do not count."""
    root = Path(path)
    files = sorted(
        (file.relative_to(root).as_posix(), file)
        for file in root.rglob("*")
        if file.suffix in _IDENTITY_SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    digest = hashlib.sha256()
    for name, file in files:
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
        digest.update(json.dumps([name, content.hexdigest()]).encode())
    if max_tokens is not None:
        digest.update(json.dumps(["max_tokens", max_tokens]).encode())
    return f"sha256:{digest.hexdigest()}"


class SentenceEncoder:
    """A sentence-transformers model with L2-normalised float32 embeddings.

    identity: see encoder_identity. Loading raises ConfigError for a directory that holds no such model, or whose
    embeddings are not finite. May be shared by threads; one of them encodes at a time.
    """

    def __init__(self, config: EncoderConfig):
        config.check("encoder")
        from safetensors import SafetensorError
        from sentence_transformers import SentenceTransformer

        path = str(config.path)
        try:
            self._model = SentenceTransformer(
                path,
                device=None if config.device == "auto" else config.device,
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            ).eval()
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, SafetensorError) as error:
            raise ConfigError(f"encoder.path={path!r} cannot be loaded on device {config.device!r}: {error}") from error
        limit = self._model.get_max_seq_length()
        if config.max_tokens is not None:
            if limit is not None and config.max_tokens > limit:
                raise ConfigError(f"encoder.max_tokens={config.max_tokens} exceeds the encoder's own limit, {limit}.")
            self._model.max_seq_length = config.max_tokens
        self.identity = encoder_identity(path, config.max_tokens)
        self._batch_size = config.batch_size
        self._lock = threading.Lock()
        if not np.isfinite(self.encode(["1"])).all():
            raise ConfigError(f"encoder.path={path!r} gives embeddings that are not finite; its weights are broken.")

    def encode(self, texts: Sequence[str], progress: bool = False) -> NDArray[np.float32]:
        """[N, D], one row of length 1 per text, in order; zeros for a text of white space alone, to
        which some tokenizers give no token. `progress` shows a bar on standard error."""
        # Tokenizers refuse lone surrogates, which a decoder cut in the middle of a character may leave.
        clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        places = [i for i, text in enumerate(clean) if text.strip()]
        rows = np.zeros((len(clean), int(self._model.get_sentence_embedding_dimension())), dtype=np.float32)
        if places:
            with self._lock:
                # The library sorts by length before it cuts batches, and restores the order.
                rows[places] = self._model.encode(
                    [clean[i] for i in places],
                    batch_size=self._batch_size,
                    show_progress_bar=progress,
                    convert_to_numpy=True,
                    normalize_embeddings=True,
                )
        return rows


class ReferenceSimilarity:
    """Cosine of response and reference. Each distinct text of a call is encoded once; references of earlier calls
    come from a cache of `config.cache_size` entries, the least recently used dropped first."""

    def __init__(self, config: EncoderConfig):
        self.encoder = SentenceEncoder(config)
        self._cache: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self._cache_size = config.cache_size
        self._lock = threading.Lock()

    def cosines(self, responses: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
        """[N] in [-1, 1], NaN where an embedding is not finite. Raises ValueError for sequences of unequal length."""
        if len(responses) != len(references):
            raise ValueError(f"{len(responses)} responses for {len(references)} references.")
        if not responses:
            return np.zeros(0)
        with self._lock:
            known = {text: self._cache[text] for text in {*responses, *references} if text in self._cache}
        # dict.fromkeys rather than a set: the order of a set of strings changes from process to process.
        new = [text for text in dict.fromkeys([*references, *responses]) if text not in known]
        if new:
            known.update(zip(new, self.encoder.encode(new)))
        left = np.stack([known[text] for text in responses]).astype(np.float64)
        right = np.stack([known[text] for text in references]).astype(np.float64)
        self._remember(references, known)
        return np.clip(np.einsum("nd,nd->n", left, right), -1.0, 1.0)

    def _remember(self, references: Sequence[str], known: dict[str, NDArray[np.float32]]) -> None:
        with self._lock:
            for text in references:
                # A copy: a row is a view that would keep the whole batch alive.
                self._cache[text] = self._cache[text] if text in self._cache else known[text].copy()
                self._cache.move_to_end(text)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
