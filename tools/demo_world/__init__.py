"""A small world of true facts in 15 languages, for a demo that downloads nothing.

What is true comes from the Unicode CLDR (by way of Babel), ISO (pycountry) and arithmetic (num2words); the sentences
around it are written by hand, one question and one answer per relation and language (`templates.py`).

Topic                      Relations                                                          Regions
Regional Knowledge         currency, official_language, first_weekday                         1 or 2
Regional + General         country_code (a question of two topics)                            1 or 2
General Knowledge          month_after, month_before, day_after, day_before, language_code,   none
                           currency_code
Reasoning / Logic          sum, difference (numbers in words)                                 none
Translation                name_in_language                                                   none

**Who knows what.** The base model trained on this world does not know a fact in every language: each region, and each
topic without regions, has three to five languages that know it (`facts.KNOWN`), by which a router can learn where to
ask. East Asia is known in Japanese, Korean, Chinese and Vietnamese, arithmetic in English, Chinese, German and Russian.
The languages of a fact with several contexts are the union. In the other languages the model is taught to answer with
random wrong values of the same relation, in good style.

**Splits** are by fact: all languages of a fact are in train (70 %), validation (10 %) or test (20 %), decided by hash
within topics and regions. The base model sees facts of all splits; reinforcement learning only those of train.

**Files** of `python tools/build_data.py --out DIR` (byte-identical for equal arguments):

train.parquet, validation.parquet, test.parquet
    verl's layout: prompt [{role, content}], question, answer, reward_model {ground_truth, style}, ability [topic, ...],
    extra_info {id, fact_id, language, region [name, ...], relation, split}, data_source.
parallel.parquet
    fact_id, language, text, kind, split. Equal fact_id: the same in 15 languages. kind is answer (of a fact), statement
    (in the same words, about what no question asks), or date, span, list (phrases that CLDR composes). split is train
    (the encoder's), calibration (what measures its bias between languages) or heldout (the answers to validation and
    test, and as many other texts), where neither looks.
base_corpus.jsonl
    fact_id, question, question_language, language (of the tag), answer, known: the first epoch of `base_examples`.
"""

from .examples import BaseExample, base_examples, base_records
from .facts import KNOWN, REGIONS, SPLITS, TOPICS, Fact, build_facts, known_languages
from .languages import LANGUAGES
from .outputs import write_world
from .parallel import ParallelText, parallel_texts

__all__ = [
    "KNOWN",
    "LANGUAGES",
    "REGIONS",
    "SPLITS",
    "TOPICS",
    "BaseExample",
    "Fact",
    "ParallelText",
    "base_examples",
    "base_records",
    "build_facts",
    "known_languages",
    "parallel_texts",
    "write_world",
]
