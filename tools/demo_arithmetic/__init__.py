"""Spelled arithmetic in 15 languages: a world in which thinking helps, and in which it matters in which language.

"What is eight plus four minus five?", asked in one of the languages of ASKED; the answer is a number in digits. To
think is to spell the steps one after the other, in any of the 15 languages:

    Acht plus vier ist gleich zwölf. Zwölf minus fünf ist gleich sieben.

Words and sentences are those of `tools/demo_world` (num2words, and templates written by hand).

**Who can calculate.** The base model knows steps that stay on one side of ten in every language, and those that cross
it (eight plus four, twelve minus five) only in the languages of CARRIES; in the others it is one out. A policy that
chooses its thinking language can find out which; one that has to think in English cannot.

**Splits** are by problem: all languages of one are in train, validation or test, by hash. The base model sees problems
of train only. A step, being one of 100, occurs in many problems.

**The cold start** teaches SEEN languages, English more than the others, with problems that stay on one side of ten,
which all of them can do. UNSEEN ones the base model can think in, but was never shown to choose.

Everything is a function of the seed.
"""

from .corpus import base_rows, teacher_replies, tokenizer_texts
from .outputs import write_questions, write_replies
from .problems import SPLITS, Problem, problems
from .wording import ASKED, CARRIES, LANGUAGES, SEEN, UNSEEN, answer, question, thinking

__all__ = [
    "ASKED",
    "CARRIES",
    "LANGUAGES",
    "SEEN",
    "SPLITS",
    "UNSEEN",
    "Problem",
    "answer",
    "base_rows",
    "problems",
    "question",
    "teacher_replies",
    "thinking",
    "tokenizer_texts",
    "write_questions",
    "write_replies",
]
