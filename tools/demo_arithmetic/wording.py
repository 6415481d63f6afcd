"""Questions, thinking and answers in words, over the demo world's number words and sentences."""

from __future__ import annotations

import re
from functools import cache

from tools.demo_world.languages import LANGUAGES, number
from tools.demo_world.templates import TEMPLATES

from .problems import Problem, Step

ASKED = ("ar", "de", "en", "es", "ja", "zh")
"""Languages of the questions, and so of the answers."""
SEEN = tuple("ar de en es fr it ja ko pt ru vi zh".split())
"""Thinking languages that the cold start teaches."""
UNSEEN = tuple(language for language in LANGUAGES if language not in SEEN)
CARRIES = ("de", "ja", "ko", "ru", "zh")
"""Languages in which the base model can cross ten."""

_ANSWERS = {
    "ar": "الجواب هو {value}.",
    "de": "Die Antwort ist {value}.",
    "en": "The answer is {value}.",
    "es": "La respuesta es {value}.",
    "fr": "La réponse est {value}.",
    "id": "Jawabannya adalah {value}.",
    "it": "La risposta è {value}.",
    "ja": "答えは{value}です。",
    "ko": "답은 {value}입니다.",
    "nl": "Het antwoord is {value}.",
    "pl": "Odpowiedź to {value}.",
    "pt": "A resposta é {value}.",
    "ru": "Ответ: {value}.",
    "vi": "Đáp án là {value}.",
    "zh": "答案是{value}。",
}
_RELATION = {1: "sum", -1: "difference"}


def question(problem: Problem, language: str) -> str:
    """The question in `language`."""
    first, last = problem.steps[0], problem.steps[-1]
    expression = number(first.left, language) + _operator(first.sign, language) + number(first.right, language)
    text = TEMPLATES[_RELATION[last.sign]][language][0].format(a=expression, b=number(last.right, language))
    return text[0].upper() + text[1:]


def thinking(steps: tuple[Step, ...], values: tuple[int, ...], language: str) -> str:
    """The steps in `language`, each with the value that is said to come out."""
    said = (_said(step, value, language) for step, value in zip(steps, values, strict=True))
    # Japanese and Chinese write no space between sentences.
    return ("" if language in ("ja", "zh") else " ").join(said)


def answer(value: int, language: str) -> str:
    """The answer in `language`, the value in digits."""
    return _ANSWERS[language].format(value=value)


@cache
def _said(step: Step, value: int, language: str) -> str:
    template = TEMPLATES[_RELATION[step.sign]][language][1]
    text = template.format(a=number(step.left, language), b=number(step.right, language), value=number(value, language))
    return text[0].upper() + text[1:]


@cache
def _operator(sign: int, language: str) -> str:
    """What stands between two numbers, spaces included."""
    found = re.search(r"\{a\}(.*?)\{b\}", TEMPLATES[_RELATION[sign]][language][0])
    assert found is not None, language
    return found[1]


__all__ = ["ASKED", "CARRIES", "LANGUAGES", "SEEN", "UNSEEN", "answer", "question", "thinking"]
