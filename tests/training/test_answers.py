"""Answers of an evaluation: kept, gone on from, scored here, graded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lrpo.config.checks import ConfigError
from nemo_lrpo.config.evaluation import TasksConfig
from nemo_lrpo.config.mode import ModeConfig
from nemo_lrpo.config.scoring import LanguageIdConfig, ScorerConfig, VerifierConfig
from nemo_lrpo.rewards import judge
from nemo_lrpo.rewards.local import LocalRewards
from nemo_lrpo.seeding import derive_seed
from nemo_lrpo.tasks import Item, Task
from nemo_lrpo.tasks.task import GENERATE, LOGPROB
from nemo_lrpo.training.answer_file import AnswerFile, fingerprint
from nemo_lrpo.training.evaluation import (
    CORRECT,
    GRADE_OF_FLAG,
    UNGRADED,
    Answer,
    Suite,
    choose,
    grade_of,
    passes_of,
)
from nemo_lrpo.training.modes import build_mode
from nemo_lrpo.types import (
    FLAG_EMPTY,
    Prompt,
    Rollouts,
    RoutedPrompt,
    Score,
    ScoreRequest,
    ScoringAbandoned,
    TaggedPrompt,
)

SETTINGS = {"model": "a", "rollout": {"end_strings": ["x"]}}


def answer(number: int, reward: float | None = 1.0, slot: int = 0) -> Answer:
    prompt = Prompt(f"q{number}", "Was?", "Das.", "de", "de", ("T",))
    score = Score(f"-1/q{number}/{slot}", reward, reward, 1.0, "de", 0.9, {"exact": 1.0}, {}, ("flag",))
    # A line separator of Unicode that ends no line here.
    return Answer(Item(prompt, f"p{number}"), f"Antwort\u2028{number}", 3, True, True, score, slot=slot)


def understand(record: Mapping[str, Any]) -> Answer:
    number = int(record["sample_id"].split("/")[1][1:])
    return Answer.of(answer(number).item, record)


def opened(out: Path, settings: Mapping[str, object] = SETTINGS, **more: Any) -> AnswerFile:
    return AnswerFile(out, settings, understand, **{"overwrite": False, "writes": True, **more})


def test_answers_are_kept_but_for_a_torn_line_and_those_without_a_score(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "test.json"
    file = opened(out)
    file.append("t", [answer(0), answer(1, None)])
    file.append("t", [answer(2)])
    file.close()
    with file.path.open("ab") as raw:
        raw.write('{"task": "t", "response": "ä'.encode()[:-1])
    again = opened(out)
    assert again.kept == {("t", "q0", 0): answer(0), ("t", "q2", 0): answer(2)}
    again.append("t", [answer(1)])
    again.close()
    assert [json.loads(line)["sample_id"] for line in again.path.read_bytes().split(b"\n")[:-1]] == [
        "-1/q0/0",
        "-1/q2/0",
        "-1/q1/0",
    ]
    assert len(opened(out, writes=False).kept) == 3


def test_answers_by_other_settings_are_refused_or_replaced(tmp_path: Path) -> None:
    out = tmp_path / "test.json"
    file = opened(out)
    file.append("t", [answer(0)])
    file.close()
    other = {"model": "b", "rollout": {"end_strings": []}, "seed": 1}
    with pytest.raises(ConfigError, match=r"test\.jsonl holds answers that differ in model, rollout, seed"):
        opened(out, other)
    assert opened(out).kept, "a refusal changes nothing"
    assert not opened(out, other, overwrite=True).kept
    (tmp_path / "foreign.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="not written by an evaluation of this kind"):
        opened(tmp_path / "foreign.json")


def test_more_answers_to_a_question_are_added_and_fewer_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "test.json"
    file = opened(out)
    file.append("t", [answer(0), answer(1)])
    file.close()
    more = opened(out, samples=2)
    assert more.kept.keys() == {("t", "q0", 0), ("t", "q1", 0)}
    more.append("t", [answer(0, 0.0, slot=1)])
    more.close()
    assert opened(out, writes=False, samples=2).kept["t", "q0", 1] == answer(0, 0.0, slot=1)
    before = more.path.read_bytes()
    with pytest.raises(ConfigError, match=r"test\.jsonl holds more than evaluation\.samples=1 answers"):
        opened(out)
    assert more.path.read_bytes() == before
    assert opened(out, overwrite=True).kept == {("t", "q0", 0): answer(0), ("t", "q1", 0): answer(1)}


def test_a_fingerprint_tells_models_apart_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "shards").mkdir(parents=True)
        (tmp_path / name / "shards" / "x.bin").write_bytes(bytes(range(256)) * 40_000)
    left, right = (fingerprint(tmp_path / name) for name in ("a", "b"))
    assert left == right
    data = bytearray((tmp_path / "b" / "shards" / "x.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b" / "shards" / "x.bin").write_bytes(data)
    assert fingerprint(tmp_path / "b") != left
    assert fingerprint(tmp_path / "a" / "shards" / "x.bin") != left
    (tmp_path / "a" / "empty").write_bytes(b"")
    assert fingerprint(tmp_path / "a") != left


def test_grades_are_those_of_the_judge() -> None:
    """The rooms do not import each other, so the names are compared here."""
    for letter, grade in judge.GRADES.items():
        verdict = judge._VERDICTS[letter]
        score = Score("s", verdict.value, verdict.value, 1.0, None, 0.0, flags=verdict.flags)
        assert grade_of(score) == grade
    assert set(GRADE_OF_FLAG.values()) | {CORRECT} == set(judge.GRADES.values())
    assert grade_of(None) == grade_of(Score("s", None, None, 1.0, None, 0.0, flags=("unjudged",))) == UNGRADED
    assert grade_of(Score("s", 0.0, 0.0, 0.0, None, 0.0, flags=(FLAG_EMPTY,))) == "NOT_ATTEMPTED"


def test_a_scorer_in_this_process_is_a_reward_service() -> None:
    config = ScorerConfig(
        languages=["de", "sw"],
        verifiers={"numeric": VerifierConfig(kind="numeric")},
        language_id=LanguageIdConfig(gate="off"),
    )
    service = LocalRewards(config)
    requests = [
        ScoreRequest("a", "Es sind zusammen genau 7 Äpfel.", "7", "de", "sw"),
        ScoreRequest("b", "8", "7", "de", "de"),
    ]
    found = service.submit(requests).result()
    assert (found["a"].reward, found["b"].reward) == (1.0, 0.0)
    assert found["a"].language == "de", "a right answer in another language counts, and is seen"
    late = service.submit(requests)
    assert service.identity()["verifiers"]["numeric"]["kind"] == "numeric"
    late.result()
    with pytest.raises(ValueError, match="'ja' is not served"):
        service.submit([ScoreRequest("c", "8", "7", "de", "ja")]).result()
    service.close()
    stopped = LocalRewards(config)
    pending = stopped.submit(requests * 2000)
    pending.cancel()
    with pytest.raises(ScoringAbandoned):
        pending.result()
    stopped.close()


class Letters:
    """An actor to which every token of a continuation is worth what `values` says, and a renderer of bytes."""

    def __init__(self, values: Mapping[str, float]):
        self._values = values

    def continuation_logprobs(self, tokens: torch.Tensor, prompts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        rows = [bytes(row[start:end].tolist()).decode() for row, start, end in zip(tokens, prompts, lengths)]
        return torch.tensor([self._values[row] for row in rows], dtype=torch.float64)

    def render_all(self, plan: Sequence[RoutedPrompt]) -> list[TaggedPrompt]:
        return [TaggedPrompt(routed, self.tokens_of(routed.prompt.question)) for routed in plan]

    def tokens_of(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())


def choice(number: int, language: str, right: int, candidates: tuple[str, ...]) -> Item:
    prompt = Prompt(f"{number}-{language}", "Was? " * (number + 1), "A", language, language, ("T",))
    return Item(prompt, str(number), candidates, right)


def test_the_most_probable_candidate_is_the_answer() -> None:
    values = {"ja": -2.0, "vielleicht": -5.0, "nein": -4.0}
    actor = Letters(values)
    items = (choice(0, "de", 0, tuple(values)), choice(1, "sw", 1, tuple(values)))
    for by_byte, best, margin in ((False, "ja", 2.0), (True, "vielleicht", 0.5)):
        task = Task("t", "include", "choice", LOGPROB, items, by_byte)
        found = choose(actor, actor, task, items)
        assert [one.text for one in found] == [best, best]
        assert [one.score.reward for one in found] == ([1.0, 0.0] if best == "ja" else [0.0, 1.0])
        assert found[0].score.measures["margin"] == pytest.approx(margin)
    task = Task("t", "include", "choice", LOGPROB, items, False)
    tied = choose(Letters(dict.fromkeys(values, -1.0)), actor, task, items)
    assert [one.text for one in tied] == ["ja", "ja"], "of equal ones the first"


def test_a_result_tells_seen_from_unseen_languages_and_leaves_out_what_has_no_value() -> None:
    items = tuple(choice(n, language, 0, ("A", "B")) for n in range(4) for language in ("de", "ja", "sw"))
    task = Task("t", "care", "judge", GENERATE, items)
    made = {
        "de": Score("s", 1.0, 1.0, 1.0, "de", 0.9),
        "ja": Score("s", 0.0, 0.0, 1.0, "en", 0.9, flags=("judged_wrong_language",)),
        "sw": Score("s", None, None, 1.0, None, 0.0, flags=("unjudged",)),
    }
    answers = [Answer(item, "x", 3, True, True, made[item.prompt.language]) for item in items]
    answers[2] = Answer(items[2], "x", 3, True, True, Score("s", 1.0, 1.0, 1.0, "sw", 0.9))
    for given, seen, unseen in ((None, ["de"], ["ja", "sw"]), (["sw"], ["de", "ja"], ["sw"])):
        suite = Suite([task], {}, TasksConfig(unseen_languages=given), languages=["de"], seed=1, max_missing_share=0.5)
        result = suite.result(task, answers)
        tree, flat = result.tree(), result.flat()
        assert [x for x, one in tree["languages"].items() if one["seen"]] == seen
        assert [x for x, one in tree["languages"].items() if not one["seen"]] == unseen
        means = {"de": 1.0, "ja": 0.0, "sw": 1.0}
        for group, members in (("seen", seen), ("unseen", unseen)):
            assert flat[f"t/accuracy_{group}"] == pytest.approx(sum(means[x] for x in members) / len(members))
        assert tree["grades"] == {"CORRECT": 5, "CORRECT_BUT_WRONG_LANGUAGE": 4, "UNGRADED": 3}
        assert (flat["t/count"], flat["t/missing"], flat["t/wrong_language"]) == (12, 3, 4)
        assert tree["languages"]["sw"]["count"] == 1 and tree["all"]["count"] == 9
        assert "unseen" in result.line() and "UNGRADED 3" in result.line()
        assert json.loads(json.dumps(tree)) == tree


class Writer(Letters):
    """An actor that answers the first question with what is right at every slot, the second one at its last slot, the
    third one never; `seeds` by sample id."""

    is_main = True

    def __init__(self, samples: int) -> None:
        super().__init__({"A": -1.0, "B": -2.0})
        self._samples = samples
        self.seeds: dict[str, int] = {}

    def generate(self, prompts: Sequence[TaggedPrompt], seeds: Sequence[int], on_finished: Any, **_: Any) -> Rollouts:
        rows = [prompt.routed for prompt in prompts]
        self.seeds |= dict(zip((row.sample_id for row in rows), seeds, strict=True))
        first_right = {"0": 0, "1": self._samples - 1, "2": self._samples}
        right = [row.slot >= first_right[row.prompt.question_id.partition("-")[0]] for row in rows]
        ones = torch.ones(len(rows), dtype=torch.int64)
        rollouts = Rollouts(
            sample_ids=tuple(row.sample_id for row in rows),
            tokens=torch.zeros(len(rows), 4, dtype=torch.int64),
            prompt_lengths=ones,
            lengths=4 * ones,
            ended=ones.bool(),
            valid=ones.bool(),
            texts=tuple("7" if one else "8" for one in right),
        )
        on_finished(rollouts)
        return rollouts

    def agree(self, error: Exception | None) -> None:
        assert error is None

    def join_scores(self, sample_ids: Sequence[str], local: Mapping[str, Score]) -> dict[str, Score]:
        return {sample_id: local[sample_id] for sample_id in sample_ids}

    def decode(self, rollouts: Rollouts, rows: Sequence[int]) -> list[str]:
        return [rollouts.texts[row] for row in rows]


def test_a_question_is_answered_several_times() -> None:
    items = tuple(
        Item(Prompt(f"{n}-de", "Wie viele?", "7", "de", "de", ("T",)), str(n), ("A", "B"), 0) for n in range(3)
    )
    tasks = [Task("math", "mgsm", "numeric", GENERATE, items), Task("exam", "include", "choice", LOGPROB, items)]
    off = LanguageIdConfig(gate="off")
    scorer = ScorerConfig(languages=["de"], verifiers={"numeric": VerifierConfig(kind="numeric")}, language_id=off)
    service = LocalRewards(scorer)
    seeds: dict[int, dict[str, int]] = {}
    for samples in (1, 4):
        config = TasksConfig(samples=samples, temperature=1.0, batch_size=5)
        suite = Suite(tasks, {"math": service}, config, languages=["de"], seed=9, max_missing_share=0.0)
        actor = Writer(samples)
        flat = suite.measure(actor, actor)
        seeds[samples] = actor.seeds
        assert (flat["math/count"], flat["exam/count"]) == (3 * samples, 3), "of a log-prob there is one"
        passes = {name: value for name, value in flat.items() if "pass_at_k" in name}
        if samples == 1:
            assert flat["math/accuracy"] == pytest.approx(2 / 3) and not passes
        else:
            # Of four answers each four, one and none are right.
            assert flat["math/accuracy"] == pytest.approx(5 / 12)
            means = {"1": (1 + 1 / 4) / 3, "2": (1 + 1 / 2) / 3, "4": 2 / 3}
            expected = {f"math/pass_at_k/{k}{end}": mean for k, mean in means.items() for end in ("", "/de")}
            assert passes == pytest.approx(expected)
    service.close()
    assert seeds[1] == {f"-1/{n}-de/0": derive_seed("evaluation", 9, f"{n}-de") for n in range(3)}
    assert seeds[1].items() <= seeds[4].items() and len(set(seeds[4].values())) == 12


def test_pass_at_k_leaves_out_what_has_no_value() -> None:
    """The first question has three values, one of them right; the second one a single one, right."""
    rewards = {(0, 0): 0.0, (0, 1): 1.0, (0, 2): 0.0, (1, 0): None, (1, 1): 1.0, (1, 2): None}
    answers = [answer(number, reward, slot) for (number, slot), reward in rewards.items()]
    means = {"1": (1 / 3 + 1) / 2, "2": 2 / 3, "3": 1.0}
    assert passes_of(answers, 3) == pytest.approx({f"{k}{end}": means[k] for k in means for end in ("", "/de")})
    assert list(passes_of(answers[3:], 3)) == ["1", "1/de"]
    assert list(passes_of([answer(0, 1.0, slot) for slot in range(6)], 6)) == [
        f"{k}{end}" for k in (1, 2, 4, 6) for end in ("", "/de")
    ]


def test_a_questions_answers_are_one_group_in_words_intervals_and_mode() -> None:
    """Of 30 questions every third is answered right, always at the same of the four slots."""
    answers = []
    for number in range(30):
        for slot in range(4):
            right = float(number % 3 == 0 and slot == 2)
            own = answer(number, right, slot)
            answers.append(replace(own, score=replace(own.score, flags=("selected:de",))))
    items = tuple(one.item for one in answers[::4])
    task = Task("t", "mgsm", "numeric", GENERATE, items)
    mode = build_mode(ModeConfig(name="explang"), 0)
    config = TasksConfig(samples=4, temperature=1.0)
    suite = Suite([task], {}, config, languages=["de"], seed=1, max_missing_share=0.0, mode=mode)
    result = suite.result(task, answers)
    flat, found = result.flat(), result.averages.macro
    assert flat["t/explang/accuracy"] == pytest.approx(1 / 12) and flat["t/explang/pass_at_k"] == pytest.approx(1 / 3)
    assert flat["t/explang/count"] == found.count == result.tree()["all"]["count"] == 120
    assert flat["t/pass_at_k/4"] == result.tree()["pass_at_k"]["4/de"] == pytest.approx(1 / 3)
    assert "120 answers" in result.line() and "pass@1 0.0833, pass@2 0.1667, pass@4 0.3333" in result.line()
    # As sure as 30 values of 0 and 1/4 are.
    error = 1.96 * (2 / 9) ** 0.5 / 4 / 30**0.5
    assert (found.high - found.low) / 2 == pytest.approx(error, rel=0.15)
