"""What a run brought, read from what it left, and the file of all runs that are done."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_lrpo.rewards.answers import plain
from nemo_lrpo.types import ORIGIN_DRAWN, ORIGIN_FIXED
from tools.demo_world import LANGUAGES, build_facts
from tools.miniature.arms import Arm, Plan, differing
from tools.miniature.kept import KeptRuns, ResultsError

Knowledge = Mapping[str, Sequence[str]]
"""By topic or region, the languages in which the base model was taught its facts."""
BASE = "base"


@dataclass(frozen=True)
class Measure:
    """What answers to the final questions were like. By language, means over its answers: `accuracy` (the sentence is
    the true one, in the question's language; see `plain`), `reward` (of the default server: calibrated and gated), and
    the accuracy of the questions that the base model was taught in that language (`known`) and of the others
    (`unknown`). Shares of all answers: `wrong_language`, and `true_somewhere`, the true sentence in any language.
    `taught`: by language, the share of its questions that are known."""

    accuracy: dict[str, float]
    reward: dict[str, float]
    known: dict[str, float]
    unknown: dict[str, float]
    taught: dict[str, float]
    wrong_language: float
    true_somewhere: float
    questions: int
    answers: int


@dataclass(frozen=True)
class Training:
    """What a training was like. Shares of the rollouts of questions whose language is free, those in a language that
    was taught the question's fact: `knowing` in all, `knowing_drawn` where the router drew (None where it never does),
    `knowing_by_step`. `asked`: languages of the questions. `drawn`: number of drawn rollouts by language. `rewards`:
    the mean reward of each step, of the run's own server. tokens: of all responses. processor_seconds: of the training
    process. step_seconds: by the clock, all steps."""

    knowing: float
    knowing_drawn: float | None
    knowing_by_step: list[float]
    asked: list[str]
    drawn: dict[str, int]
    rewards: list[float]
    tokens: int
    rollouts: int
    processor_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Outcome:
    """A run that is done; `training` is None for the base model. `digests`: see Plan."""

    arm: str
    seed: int
    digests: dict[str, str]
    measure: Measure
    training: Training | None


def read_measure(answers: Path, knowledge: Knowledge) -> Measure:
    """Of the answers that nemo_lrpo.evaluate left (`<name>.jsonl`)."""
    truths = {fact.fact_id: {plain(fact.answer(language)) for language in LANGUAGES} for fact in build_facts()}
    accuracy: dict[str, list[float]] = defaultdict(list)
    reward: dict[str, list[float]] = defaultdict(list)
    known: dict[str, list[float]] = defaultdict(list)
    unknown: dict[str, list[float]] = defaultdict(list)
    wrong = true_somewhere = count = 0
    questions: set[str] = set()
    for record in _lines(answers):
        language, said, score = record["language"], plain(record["response"]), record["score"]
        right = float(said == plain(record["reference"]))
        count += 1
        questions.add(record["sample_id"].rpartition("/")[0])
        accuracy[language].append(right)
        (known if language in knowing(record, knowledge) else unknown)[language].append(right)
        fact_id = record["sample_id"].partition("/")[2].rpartition("/")[0].rpartition("/")[0]
        true_somewhere += said in truths[fact_id]
        if score is not None and score["reward"] is not None:
            reward[language].append(score["reward"])
            wrong += score["language"] is not None and score["language"] != language
    return Measure(
        accuracy=_means(accuracy),
        reward=_means(reward),
        known=_means(known),
        unknown=_means(unknown),
        taught={language: len(known.get(language, ())) / len(own) for language, own in sorted(accuracy.items())},
        wrong_language=wrong / count,
        true_somewhere=true_somewhere / count,
        questions=len(questions),
        answers=count,
    )


def read_training(run_dir: Path, knowledge: Knowledge, processor_seconds: float) -> Training:
    """Of metrics.jsonl and rollouts.jsonl, which holds every rollout."""
    steps = [record for record in _lines(run_dir / "metrics.jsonl") if record["kind"] == "train"]
    hits: dict[int, list[bool]] = defaultdict(list)
    drawn_hits: list[bool] = []
    drawn: Counter[str] = Counter()
    asked: set[str] = set()
    rollouts = 0
    for record in _lines(run_dir / "rollouts.jsonl"):
        rollouts += 1
        asked.add(record["question_language"])
        if record["origin"] == ORIGIN_FIXED:
            continue
        hit = record["language"] in knowing(record, knowledge)
        hits[record["step"]].append(hit)
        if record["origin"] == ORIGIN_DRAWN:
            drawn_hits.append(hit)
            drawn[record["language"]] += 1
    return Training(
        knowing=fmean(hit for own in hits.values() for hit in own),
        knowing_drawn=fmean(drawn_hits) if drawn_hits else None,
        knowing_by_step=[fmean(hits[step]) for step in sorted(hits)],
        asked=sorted(asked),
        drawn=dict(sorted(drawn.items())),
        rewards=[record["reward"] for record in steps],
        tokens=round(sum(record["length"] * record["count"] for record in steps)),
        rollouts=rollouts,
        processor_seconds=processor_seconds,
        step_seconds=sum(record["time/step"] for record in steps),
    )


def knowing(record: Mapping[str, Any], knowledge: Knowledge) -> set[str]:
    """The languages in which the base model was taught the fact that a rollout or answer is about."""
    return {language for name in (*record["topics"], *record["regions"]) for language in knowledge.get(name, ())}


class Results(KeptRuns[Outcome]):
    """The outcomes of tools/reproduce.py."""

    def __init__(self, path: Path) -> None:
        """See KeptRuns."""
        super().__init__(path, _outcome, "tools/reproduce.py")

    def check(self, plan: Plan, arms: Iterable[Arm]) -> None:
        """Raise ResultsError where a run of `arms`, or of the base model, is not of `plan`."""
        wanted = {arm.name: plan.digests(arm) for arm in arms}
        common = {name: value for own in wanted.values() for name, value in own.items() if name in plan.common}
        for outcome in self._found.values():
            digests = common if outcome.arm == BASE else wanted.get(outcome.arm)
            changed = [] if digests is None else differing(outcome.digests, digests)
            if changed:
                raise ResultsError(
                    f"{self.path}: the run {outcome.arm}, seed {outcome.seed}, had another {', '.join(changed)} than "
                    "this one has now, and would be compared with what it cannot be. Go on with what it had, or give "
                    "another --out."
                )


def _outcome(record: Mapping[str, Any]) -> Outcome:
    training = record["training"]
    names = [{field.name for field in fields(kind)} for kind in (Measure, Training)]
    return Outcome(
        record["arm"],
        record["seed"],
        record["digests"],
        Measure(**{name: record["measure"][name] for name in names[0]}),
        None if training is None else Training(**{name: training[name] for name in names[1]}),
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    # Not splitlines: a text may hold other characters that end lines.
    with path.open("rb") as file:
        yield from (json.loads(line) for line in file)


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {language: fmean(own) for language, own in sorted(values.items()) if own}
