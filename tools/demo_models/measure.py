"""What the base model knows and how the encoder judges, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_models.base_model import ExampleEncoder, sample
from demo_models.encoder import Sentence, embed


@dataclass(frozen=True)
class Question:
    """A question to the base model: the tag's language, whether its facts are known there, and the true answer."""

    text: str
    language: str
    known: bool
    answer: str


@dataclass(frozen=True)
class Knowledge:
    """Rates in [0, 1] of one language, nan where nothing was asked.

    following: answers in the tag's language. known, unknown: exactly the true answer, among questions whose fact the
    language knows, and does not know.
    """

    following: float
    known: float
    unknown: float


def measure_knowledge(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    identify: Callable[[str], str],
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Knowledge]:
    """`Knowledge` per language of the tag. identify: text -> ISO 639-1 code. temperature 0 is greedy."""
    prompts = ExampleEncoder(tokenizer).prompts([(question.text, question.language) for question in questions])
    answers = sample(model, tokenizer, prompts, temperature, seed=seed)

    def rate(hits: Sequence[bool]) -> float:
        return float(np.mean(hits)) if hits else float("nan")

    result = {}
    for language in sorted({question.language for question in questions}):
        rows = [(q, answer) for q, answer in zip(questions, answers, strict=True) if q.language == language]
        result[language] = Knowledge(
            following=rate([identify(answer) == language for _, answer in rows]),
            known=rate([answer == q.answer for q, answer in rows if q.known]),
            unknown=rate([answer == q.answer for q, answer in rows if not q.known]),
        )
    return result


@torch.no_grad()
def measure_separation(
    model: BertModel,
    tokenizer: PreTrainedTokenizerFast,
    sentences: Sequence[Sentence],
    cross_language: bool,
    pairs_per_fact: int = 15,
    seed: int = 0,
) -> float:
    """AUC of cosine(reference in A, true sentence in B) over cosine(reference in A, wrong value in B).

    cross_language: A and B differ, else they are equal (and the true sentence is the reference itself).
    """
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    texts: list[str] = []
    for sentence in sentences:
        languages = sorted(sentence.true)
        for _ in range(pairs_per_fact):
            one, other = rng.choice(len(languages), size=2, replace=False)
            target = languages[other if cross_language else one]
            wrong = sentence.wrong[target]
            texts += [sentence.true[languages[one]], sentence.true[target], wrong[rng.integers(len(wrong))]]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    parts = [embed(model, ids[start : start + 512], tokenizer.pad_token_id) for start in range(0, len(ids), 512)]
    reference, right, wrong_ = torch.cat(parts).unflatten(0, (-1, 3)).unbind(1)
    scores = torch.cat([(reference * right).sum(-1), (reference * wrong_).sum(-1)]).numpy()
    labels = np.repeat([1, 0], len(scores) // 2)
    return float(roc_auc_score(labels, scores))
