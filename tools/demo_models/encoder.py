"""The demo's encoder: a small sentence-transformers model for fifteen languages, with its bias between them left in.

A contrastive loss over parallel sentences: an anchor in one language, its translation in another as the positive, the
batch's other sentences and wrong values of the same fact as negatives. Training is short on purpose. Languages stay
some way apart from each other, as they do in real multilingual encoders, and similarities need calibration.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from .base_model import fast_matmul, keep_memory, warmup_cosine


@dataclass(frozen=True)
class EncoderRecipe:
    """Size and training of the encoder; the defaults are what the demo ships."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    ffn: int = 256
    context: int = 128
    steps: int = 1000
    facts_per_batch: int = 48
    negatives: int = 1
    temperature: float = 0.1
    peak_lr: float = 1e-3
    warmup: float = 0.05


@dataclass(frozen=True)
class Sentence:
    """A fact as it is said in every language: language -> the true sentence, language -> wrong ones."""

    fact_id: str
    true: Mapping[str, str]
    wrong: Mapping[str, Sequence[str]]


def new_encoder(tokenizer: PreTrainedTokenizerFast, recipe: EncoderRecipe, seed: int) -> BertModel:
    """A randomly initialised encoder, a function of the seed alone."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.ffn,
        max_position_embeddings=recipe.context,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertModel(config)


def embed(model: BertModel, token_ids: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """Normalised mean-pooled embeddings float32 [N, hidden] of N token-id lists."""
    width = max(map(len, token_ids))
    tokens = np.full((len(token_ids), width), pad_id, dtype=np.int64)
    for row, ids in enumerate(token_ids):
        tokens[row, : len(ids)] = ids
    ids = torch.from_numpy(tokens)
    mask = ids != pad_id
    with fast_matmul():
        hidden = model(ids, attention_mask=mask.long()).last_hidden_state
    weights = mask.unsqueeze(-1).float()
    pooled = (hidden.float() * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1)


def train_encoder(
    model: BertModel,
    tokenizer: PreTrainedTokenizerFast,
    sentences: Sequence[Sentence],
    recipe: EncoderRecipe,
    seed: int,
    line: int = 0,
) -> float:
    """Train on `sentences`; returns seconds. The seed decides the outcome. line: of the progress bar on the screen.

    InfoNCE over cosine / temperature: each anchor against every true sentence of the batch and every hard negative.
    """
    keep_memory()
    started = time.perf_counter()
    ids: dict[str, list[int]] = {}
    limit = recipe.context

    def encode(text: str) -> list[int]:
        if text not in ids:
            ids[text] = tokenizer.encode(text, add_special_tokens=False)[:limit]
        return ids[text]

    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.peak_lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(recipe.steps, recipe.warmup))
    model.train()
    pad = tokenizer.pad_token_id
    size = min(recipe.facts_per_batch, len(sentences))
    for step in tqdm(range(recipe.steps), desc="encoder", unit="step", mininterval=1.0, position=line):
        rng = np.random.default_rng((seed, step))
        anchors, positives, negatives = [], [], []
        for index in rng.choice(len(sentences), size=size, replace=False):
            sentence = sentences[index]
            languages = sorted(sentence.true)
            one, other = rng.integers(len(languages)), rng.integers(len(languages))
            anchors.append(encode(sentence.true[languages[one]]))
            positives.append(encode(sentence.true[languages[other]]))
            # Half of the hard negatives are in the anchor's own language, so that language alone decides nothing.
            wrong = sentence.wrong[languages[one if rng.random() < 0.5 else other]]
            for _ in range(recipe.negatives):
                negatives.append(encode(wrong[rng.integers(len(wrong))]))
        vectors = embed(model, anchors + positives + negatives, pad)
        left, right = vectors[:size], vectors[size:]
        logits = left @ right.T / recipe.temperature
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    return time.perf_counter() - started


def save_encoder(model: BertModel, tokenizer: PreTrainedTokenizerFast, directory: Path, recipe: EncoderRecipe) -> None:
    """Write a directory that `SentenceTransformer(directory)` opens: transformer, mean pooling, normalisation."""
    import tempfile

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        transformer = Transformer(scratch, max_seq_length=recipe.context)
        pooling = Pooling(recipe.hidden, pooling_mode="mean")
        SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save(
            str(directory), create_model_card=False
        )
