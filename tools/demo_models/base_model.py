"""The demo's base model: a small Llama that knows different facts in different languages.

Trained from nothing on the world's base examples: a question in one language, a tag, an answer in the language of the
tag. Some examples answer in another language or with a wrong value, so that the model that results follows the tag
mostly, and knows what it knows with some doubt: what reinforcement learning is there to improve.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_models.tokenizer import render


@dataclass(frozen=True)
class BaseModelRecipe:
    """Size and training of the base model; the defaults are what the demo ships."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    groups: int = 2
    ffn: int = 384
    context: int = 256
    epochs: int = 12
    batch_tokens: int = 4096
    peak_lr: float = 4e-3
    warmup: float = 0.05
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Example:
    """A prompt of the base model with one answer, as token ids; the answer ends with the end token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


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

    A batch holds about `batch_tokens` tokens. Padding comes after the end, where causal attention never looks.
    """
    lengths = np.array([len(example.prompt) + len(example.answer) for example in examples])
    # The noise mixes neighbours in length anew each time.
    order = np.argsort(lengths + rng.uniform(0, 4, len(examples)), kind="stable")
    groups, start = [], 0
    while start < len(order):
        size = max(1, int(batch_tokens // lengths[order[start : start + 1]].max()))
        groups.append(order[start : start + size])
        start += size
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
    epochs: Sequence[Sequence[Example]],
    recipe: BaseModelRecipe,
    seed: int,
) -> float:
    """Train on `epochs` in order, with warm-up and cosine decay; returns seconds. Only the seed decides the outcome."""
    keep_memory()
    started = time.perf_counter()
    total = sum(1 for index, epoch in enumerate(epochs) for _ in batches(epoch, recipe.batch_tokens, _rng(seed, index)))
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    other = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": other, "weight_decay": 0.0}],
        lr=recipe.peak_lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    warmup = max(1, int(total * recipe.warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, step / total))) + 1e-3),
    )
    model.train()
    smooth = None
    with tqdm(total=total, desc="base model", unit="step", mininterval=1.0) as bar:
        for index, epoch in enumerate(epochs):
            for tokens, labels in batches(epoch, recipe.batch_tokens, _rng(seed, index)):
                with fast_matmul():
                    loss = answer_loss(model, tokens, labels)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                value = float(loss.detach())
                smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
                bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
                bar.update()
    model.eval()
    return time.perf_counter() - started


def _rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng((seed, epoch))


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


def encode_examples(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str, str, str]]
) -> list[Example]:
    """(question, its language, language asked for, answer) rows as token ids."""
    prompts: dict[tuple[str, str], tuple[int, ...]] = {}
    answers: dict[str, tuple[int, ...]] = {}
    encoded = []
    for question, _, language, answer in rows:
        if (question, language) not in prompts:
            prompts[question, language] = tuple(render(tokenizer, question, language))
        if answer not in answers:
            answers[answer] = (*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id)
        encoded.append(Example(prompts[question, language], answers[answer]))
    return encoded
