"""From preference data to training questions, against a real labelling endpoint and invented rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_endpoint import ChatEndpoint, serve_chat
from encoder_fixture import build_tiny_encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lrpo.data.reader import read_prompts
from tools.preparation.labels import REGIONS, TOPICS, EncoderLabeller, LabelNames
from tools.preparation.neighbours import ContainedTests, NearDuplicates, grams, jaccard
from tools.preparation.sources import Example, Source
from tools.preparation.writing import stratified
from tools.prepare_data import main

QUESTIONS = {
    "de": (
        "Wie begrüßt man in Japan einen älteren Menschen richtig?",
        "Warum ist der Himmel am Abend so oft rot gefärbt?",
        "Wie schreibe ich eine höfliche Absage an einen Bewerber?",
        "Welche Strafe droht einem Fahrer ohne gültigen Führerschein?",
    ),
    "en": (
        "How do people greet an older person politely in Japan?",
        "Why does the evening sky so often turn red and orange?",
        "How do I write a polite letter that declines an applicant?",
        "Which penalty does a driver without a valid licence face?",
    ),
}
ANSWERS = {
    "de": "Das hängt davon ab, wo man lebt und wen man fragt.",
    "en": "That depends on where you live, and on whom you ask about it.",
}


NAN = float("nan")


def helpsteer(question: str, answer: str, language: str, **changes: Any) -> dict[str, Any]:
    row = {
        "domain": "multilingual",
        "language": language,
        "context": [{"role": "user", "content": question}],
        "response1": answer,
        "response2": f"{answer} {answer}",
        "overall_preference": -2,
        "individual_preference": [{"score": -2, "reasoning": "", "feedback1": "", "feedback2": ""}],
    }
    return {**row, **changes}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def by_word(prompt: str) -> str:
    if "Japan" in prompt:
        return json.dumps({"topic": "Regional Knowledge", "region": "Japan"})
    return "```json\n" + json.dumps({"topic": "General Knowledge", "region": None}) + "\n```"


@pytest.fixture
def endpoint() -> Iterator[ChatEndpoint]:
    with serve_chat(by_word) as endpoint:
        yield endpoint


@pytest.fixture
def good(tmp_path: Path) -> Path:
    rows = [helpsteer(q, ANSWERS[x], {"de": "german", "en": "English"}[x]) for x, own in QUESTIONS.items() for q in own]
    return write_lines(tmp_path / "good.jsonl", rows)


def run(out: Path, *arguments: object) -> list[dict[str, Any]]:
    """The rejected rows."""
    assert main([*map(str, arguments), "--out", str(out), "--languages", "de,en"]) == 0
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def asking(endpoint: ChatEndpoint) -> tuple[str, ...]:
    return "--label-url", endpoint.url, "--label-model", "m", "--label-timeout", "2"


def test_rows_become_training_questions_and_a_card(good: Path, endpoint: ChatEndpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, "--source", f"helpsteer3={good}", "--validation", 0.25, *asking(endpoint)) == []
    splits = {name: read_prompts(out / f"{name}.parquet", ["de", "en"]) for name in ("train", "validation")}
    assert {name: len(prompts) for name, prompts in splits.items()} == {"train": 6, "validation": 2}
    everything = {prompt.question: prompt for prompts in splits.values() for prompt in prompts}
    assert set(everything) == {question for own in QUESTIONS.values() for question in own}
    japan = everything[QUESTIONS["de"][0]]
    assert (japan.language, japan.topics, japan.regions) == ("de", ("Regional Knowledge",), ("Japan",))
    assert japan.reference == ANSWERS["de"], "the preferred response"
    assert Counter(prompt.language for prompt in splits["validation"]) == {"de": 1, "en": 1}
    card = (out / "card.md").read_text(encoding="utf-8")
    assert "| helpsteer3 | 8 | 0 | 8 |" in card and "| Regional Knowledge | " in card and "| Japan | " in card
    assert len(endpoint.prompts) == 8


def test_a_start_after_a_kill_asks_for_the_rest(good: Path, endpoint: ChatEndpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--source", f"helpsteer3={good}", *asking(endpoint))
    run(out, *arguments)
    whole = {name: (out / name).read_bytes() for name in ("card.md", "rejected.jsonl")}
    rows = pq.read_table(out / "train.parquet")
    lines = (out / "labels.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 8
    # Killed within the sixth line.
    (out / "labels.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    endpoint.prompts.clear()
    run(out, *arguments)
    assert len(endpoint.prompts) == 3
    assert {name: (out / name).read_bytes() for name in whole} == whole
    assert pq.read_table(out / "train.parquet").equals(rows)


def test_what_is_not_taken_is_listed_with_its_reason(good: Path, endpoint: ChatEndpoint, tmp_path: Path) -> None:
    first = QUESTIONS["de"][1]
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", first))]
    bad: list[tuple[Any, str]] = [
        (helpsteer(first, ANSWERS["de"], "german"), "the same question"),
        (helpsteer(f"{first} Sag!", ANSWERS["de"], "german"), "nearly the same question"),
        (helpsteer("Vorab: " + QUESTIONS["de"][2].upper(), ANSWERS["de"], "de"), "nearly the same question"),
        (helpsteer("42?", ANSWERS["de"], "python"), "the question's language cannot be said"),
        (
            helpsteer("Pourquoi le ciel du soir est-il si souvent rouge ?", "Parce que.", "french"),
            "in another language",
        ),
        (
            helpsteer("Wozu dient eigentlich die zweite Tür am Bahnhof?", ANSWERS["de"], "english"),
            "not in the language it is said to be in",
        ),
        (
            helpsteer("Wozu dient eigentlich die dritte Tür am Flughafen?", ANSWERS["en"], "german"),
            "the reference is in another language",
        ),
        (helpsteer("", "", "german", context=turns, response1="b"), "more than one turn"),
        (helpsteer(first, ANSWERS["de"], "german", overall_preference=0), "no clear preference"),
        (helpsteer(first, ANSWERS["de"], "german", overall_preference="strong"), "not readable"),
        (helpsteer("Warum? " * 700, ANSWERS["de"], "german"), "the question is too long"),
        (["no object"], "not readable"),
        (helpsteer("Wie viele Äpfel hat Lena, wenn sie vier kauft?", ANSWERS["de"], "german"), "a test question"),
        (helpsteer("Gibt es ein Wort ohne jede sinnvolle Zuordnung?", ANSWERS["de"], "german"), "no label"),
    ]
    source = write_lines(tmp_path / "bad.jsonl", [row for row, _ in bad])
    test = tmp_path / "mgsm_de.tsv"
    test.write_text("Wie viele Äpfel hat Lena, wenn sie vier kauft?\t4\n", encoding="utf-8")
    endpoint.answer = lambda prompt: "I cannot say." if "Zuordnung" in prompt else by_word(prompt)
    arguments = ("--source", f"helpsteer3={good}", "--source", f"helpsteer3={source}", "--test", f"mgsm={test}")
    found = run(tmp_path / "out", *arguments, "--near", 0.7, *asking(endpoint))
    reasons = {row["where"].rpartition("line ")[2]: row["reason"] for row in found}
    assert reasons == {str(number): reason for number, (_, reason) in enumerate(bad, start=1)}
    assert all(str(source) in row["where"] for row in found)
    assert next(row["detail"] for row in found if row["reason"] == "a test question").startswith("100% of")
    card = (tmp_path / "out" / "card.md").read_text(encoding="utf-8")
    assert "| helpsteer3 | 22 | 14 | 8 |" in card and "| helpsteer3 | not readable | 2 |" in card


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_care_gives_the_best_rated_response_of_each_question(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third, _ = QUESTIONS["de"]
    rows = [
        {"question": first, "response": "Ohne jede Wertung.", "human_rating": NAN, "source": "x"},
        {"question": first, "response": "Gar nicht.", "human_rating": 3.0, "source": "x"},
        {"question": first, "response": "Mit einer Verbeugung, die Respekt zeigt.", "human_rating": 9, "source": "y"},
        {"question": first, "response": "Auch so, nur später gesagt.", "human_rating": 9, "source": "z"},
        {"question": second, "response": "Das weiß niemand so genau.", "human_rating": 5, "source": "x"},
        {"question": third, "response": "Kurz und freundlich.", "human_rating": 10, "source": "human"},
    ]
    rows = [{"cul_type": "Social norms", "associated_culture": "Japan", **row} for row in rows]
    path = tmp_path / f"care.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    encoder = build_tiny_encoder(tmp_path / "encoder")
    rejected = run(tmp_path / "out", "--source", f"care={path}", "--label-encoder", encoder, "--validation", 0)
    word = "entry" if suffix == "json" else "row"
    assert {row["where"].rpartition(f"{word} ")[2]: (row["reason"], row["detail"]) for row in rejected} == {
        "0": ("not readable", f"human_rating is {NAN!r}; accepted: a number from 1 to 10."),
        "1": ("not the best rated", f"3; {path}, {word} 2 has 9"),
        "3": ("not the best rated", f"9; {path}, {word} 2 has 9"),
        "4": ("rated too low", "best of its responses: 5"),
    }
    assert "| care | 6 | 4 | 2 |" in (tmp_path / "out" / "card.md").read_text(encoding="utf-8")
    # The list of a JSON file is read as a whole, a parquet file says how long it is.
    shown = capsys.readouterr().err
    assert f"reading {path.name}" in shown and ("6/6" in shown) == (suffix == "parquet")
    prompts = read_prompts(tmp_path / "out" / "train.parquet", ["de", "en"])
    assert {prompt.question: prompt.reference for prompt in prompts} == {
        first: "Mit einer Verbeugung, die Respekt zeigt.",
        third: "Kurz und freundlich.",
    }


def test_an_answer_of_its_own_is_taken_once(tmp_path: Path) -> None:
    rows = [{"question": "Q?", "response": x, "rating": 9} for x in "ab"]
    rows[1:1] = [{"question": "Q?", "response": x, "answer": "A", "rating": 1} for x in "cd"]
    path = write_lines(tmp_path / "care.jsonl", rows)
    found = list(Source("care", path, min_preference=1, min_rating=8.0))
    assert [getattr(one, "reason", "") for one in found] == [
        *("not the best rated", "the same question", "not the best rated", ""),
    ]
    taken = found[-1]
    assert isinstance(taken, Example) and taken.reference == "A" and taken.where.endswith("line 2")


def test_a_test_file_that_says_no_language_is_refused_by_what_to_name_it(good: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.tsv"
    test.write_text("Wie viele?\t4\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"test\.tsv, line 1: language is missing.* such as mgsm_de\.tsv"):
        run(tmp_path / "out", "--source", f"helpsteer3={good}", "--test", f"mgsm={test}")


def test_a_source_is_believed_unless_the_identifier_is_sure(tmp_path: Path) -> None:
    row = {"query": QUESTIONS["de"][0], "chosen": ANSWERS["de"], "language": "en", "topic": "T", "region": None}
    source = f"lrpo={write_lines(tmp_path / 'a.jsonl', [row, {**row, 'query': '7 + 8 = ?'}])}"
    for sure, languages in ((0.9, ["en"]), (1.0, ["en", "en"])):
        run(tmp_path / "out", "--source", source, "--validation", 0, "--sure", sure, "--keep-mixed")
        prompts = read_prompts(tmp_path / "out" / "train.parquet", ["de", "en"])
        assert [prompt.language for prompt in prompts] == languages
    assert all(prompt.reference_language in ("de", "en") for prompt in prompts)


def test_labels_of_the_source_are_kept_and_missing_ones_are_asked_for(tmp_path: Path) -> None:
    row = {"query": QUESTIONS["en"][0], "chosen": ANSWERS["en"], "language": "en", "topic": "T", "region": "R"}
    run(tmp_path / "out", "--source", f"lrpo={write_lines(tmp_path / 'a.jsonl', [row])}", "--validation", 0)
    (prompt,) = read_prompts(tmp_path / "out" / "train.parquet", ["en"])
    assert (prompt.topics, prompt.regions) == (("T",), ("R",))
    del row["topic"]
    with pytest.raises(SystemExit, match=r"1 questions have no topic, .*a\.jsonl, line 1 the first; give --label-url"):
        run(tmp_path / "out", "--source", f"lrpo={write_lines(tmp_path / 'a.jsonl', [row])}")
    # What is written can be read again.
    again = run(tmp_path / "again", "--source", f"training={tmp_path / 'out' / 'train.parquet'}", "--validation", 0)
    assert again == [] and read_prompts(tmp_path / "again" / "train.parquet", ["en"]) == [prompt]


def test_an_endpoint_that_refuses_all_ends_in_one_line_and_a_busy_one_is_asked_again(
    good: Path, endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    busy = iter([503, 429])
    endpoint.answer = lambda prompt: next(busy, None) or by_word(prompt)
    assert run(tmp_path / "out", "--source", f"helpsteer3={good}", *asking(endpoint)) == []
    assert len(endpoint.prompts) == 10
    endpoint.answer = lambda prompt: 401
    with pytest.raises(SystemExit, match="ConfigError: .* HTTP 401; see --label-url"):
        run(tmp_path / "other", "--source", f"helpsteer3={good}", *asking(endpoint))


def test_the_encoder_chooses_the_nearest_label(tmp_path: Path) -> None:
    """Whatever a random encoder thinks, a text is nearest to itself."""
    names = LabelNames.read(None)
    labeller = EncoderLabeller(str(build_tiny_encoder(tmp_path / "encoder")), names)
    texts = [f"{name}: {about}" for name, about in TOPICS.items()]
    found = dict(labeller.label(texts, batch=4))
    assert [found[number].topic for number in range(len(texts))] == list(TOPICS)
    assert [label.region in REGIONS for label in found.values()] == [name == "Regional Knowledge" for name in TOPICS]


WORDS = st.lists(
    st.sampled_from("apple river stone cloud green seven walks house never light".split()), min_size=8, unique=True
)


@settings(max_examples=40)
@given(WORDS, st.integers(0, 7))
def test_similarity_is_that_of_the_sets(words: list[str], place: int) -> None:
    text = " ".join(words)
    assert jaccard(grams(text), grams(f"  {text.upper()}\n")) == 1.0
    changed = " ".join([*words[:place], "ZEBRA", *words[place + 1 :]])
    sets = [{t[i : i + 5] for i in range(len(t) - 4)} for t in (text, changed.casefold())]
    expected = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert jaccard(grams(text), grams(changed)) == pytest.approx(expected)
    duplicates = NearDuplicates(0.9)
    assert duplicates.add(grams(text)) is None
    found = duplicates.add(grams(changed))
    # Below the threshold never; above it nearly always, here always.
    assert (found is not None) == (expected >= 0.9)
    index = ContainedTests([grams(text), grams("quite another question about trains and planes")])
    assert index.closest(grams(f"Before it: {text} And after it.")) == (0, 1.0)
    shared = len(np.intersect1d(grams(text), grams(changed)))
    assert index.closest(grams(changed)) == (0, pytest.approx(shared / len(grams(text))))


def test_a_short_test_question_has_to_be_the_whole_text() -> None:
    index = ContainedTests([grams("Und jetzt?")])
    assert index.closest(grams("und jetzt?")) == (0, 1.0)
    assert index.closest(grams("Was machen wir heute, und jetzt? Sag es mir."))[1] < 0.3
    assert ContainedTests([]).closest(grams("x")) == (-1, 0.0)
    assert index.closest(grams("")) == (0, 0.0)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["de", "en"]), st.sampled_from(["A", "B"])), st.integers(1, 30), min_size=1
    ),
    st.floats(0, 1),
    st.integers(0, 5),
)
def test_the_split_takes_its_share_of_every_stratum(sizes: dict, share: float, seed: int) -> None:
    examples = [
        Example("s", "w", f"{key}{i}", "r", language=key[0], topic=key[1]) for key, n in sizes.items() for i in range(n)
    ]
    aside = stratified(examples, share, seed)
    assert sum(aside) == round(share * len(examples))
    taken = Counter((e.language, e.topic) for e, is_aside in zip(examples, aside) if is_aside)
    for key, size in sizes.items():
        assert abs(taken[key] - share * size) < 1 + 1e-9
    # Which ones does not depend on the others' order.
    order = list(reversed(range(len(examples))))
    assert stratified([examples[i] for i in order], share, seed) == [aside[i] for i in order]


def test_help_says_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "rejected.jsonl" in capsys.readouterr().out
