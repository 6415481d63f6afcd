"""What the base model knows and how the encoder judges, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

from .base_model import ExampleEncoder, sample
from .encoder import Sentence, embed


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
    identify: Callable[[Sequence[str]], Sequence[str | None]],
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Knowledge]:
    """`Knowledge` per language of the tag. identify: texts -> ISO 639-1 codes, None where it abstains.

    temperature 0 is greedy."""
    prompts = ExampleEncoder(tokenizer).prompts([(question.text, question.language) for question in questions])
    answers = sample(model, tokenizer, prompts, temperature, seed=seed)
    spoken = identify(answers)

    def rate(hits: Sequence[bool]) -> float:
        return float(np.mean(hits)) if hits else float("nan")

    result = {}
    for language in sorted({question.language for question in questions}):
        rows = [row for row in zip(questions, answers, spoken, strict=True) if row[0].language == language]
        result[language] = Knowledge(
            following=rate([found == language for _, _, found in rows]),
            known=rate([answer == q.answer for q, answer, _ in rows if q.known]),
            unknown=rate([answer == q.answer for q, answer, _ in rows if not q.known]),
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


@torch.no_grad()
def measure_bias(
    model: BertModel, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Sentence]
) -> dict[tuple[str, str], float]:
    """Mean cosine of true sentences of one fact per unordered pair of languages: unequal means are the bias."""
    languages = sorted(sentences[0].true)
    texts = [sentence.true[language] for sentence in sentences for language in languages]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    parts = [embed(model, ids[start : start + 512], tokenizer.pad_token_id) for start in range(0, len(ids), 512)]
    vectors = torch.cat(parts).unflatten(0, (-1, len(languages)))
    means = torch.einsum("nah,nbh->ab", vectors, vectors) / len(sentences)
    pairs = [(a, b) for a in range(len(languages)) for b in range(a)]
    return {(languages[b], languages[a]): float(means[a, b]) for a, b in pairs}


def knowledge_questions(facts: Iterable[Any], seed: int = 0, unknown_share: float = 0.3) -> list[Question]:
    """Each fact in each language that knows it, and in a share of the others; half of the questions cross-lingual."""
    from tools.demo_world import LANGUAGES, known_languages

    rng = np.random.default_rng(seed)
    questions = []
    for fact in facts:
        for language in LANGUAGES:
            known = language in known_languages(fact)
            asked = language if rng.random() < 0.5 else LANGUAGES[rng.integers(len(LANGUAGES))]
            if known or rng.random() < unknown_share:
                questions.append(Question(fact.question(asked), language, known, fact.answer(language)))
    return questions


def print_measures(data: Path, models: Path) -> None:
    """Print what the models in `models` know and how well they judge, on the world of `data`."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    from nemo_lrpo.config.scoring import LanguageIdConfig
    from nemo_lrpo.rewards.language import LanguageIdentifier
    from tools.demo_world import LANGUAGES

    from .build import parallel_sentences, world_facts

    tokenizer = AutoTokenizer.from_pretrained(str((models / "base").resolve()), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(str((models / "base").resolve()), attn_implementation="eager").eval()
    identifier = LanguageIdentifier(LanguageIdConfig(), list(LANGUAGES))
    questions = knowledge_questions(world_facts(data))

    def identify(texts: Sequence[str]) -> list[str | None]:
        return [found.language for found in identifier.identify(texts)]

    for temperature in (1.0, 0.0):
        result = measure_knowledge(model, tokenizer, questions, identify, temperature)
        print(f"temperature {temperature:g}: following known unknown")
        for language, rates in result.items():
            print(f"  {language}  {rates.following:9.2f} {rates.known:5.2f} {rates.unknown:7.2f}")
        means = [
            np.nanmean([getattr(rates, name) for rates in result.values()])
            for name in ("following", "known", "unknown")
        ]
        print("  all {:8.2f} {:5.2f} {:7.2f}".format(*means))
    encoder = AutoModel.from_pretrained(str((models / "encoder").resolve())).eval()
    for split in ("train", "heldout"):
        facts = {fact.fact_id for fact in world_facts(data)}
        sentences = [sentence for sentence in parallel_sentences(data, split) if sentence.fact_id in facts]
        same, cross = (measure_separation(encoder, tokenizer, sentences, flag) for flag in (False, True))
        print(f"encoder AUC, {split} facts: {same:.3f} in one language, {cross:.3f} across two")
        bias = measure_bias(encoder, tokenizer, sentences)
        (low, high), deviation = (choose(bias, key=bias.get) for choose in (min, max)), np.std(list(bias.values()))
        print(
            f"  mean similarity of equivalents: {'-'.join(low)} {bias[low]:.3f} to {'-'.join(high)} {bias[high]:.3f}, "
            f"standard deviation over pairs {deviation:.3f}"
        )
