"""ExpLang against training that thinks in English: arms, what a run brought, table and figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo_lrpo.config.mode import EXPLANG
from tools.miniature.kept import KeptRuns
from tools.miniature.statistics import estimate, paired
from tools.miniature.text import head, plus_minus, row

CHOOSES, ENGLISH, PROPOSED = "explang", "english", "hybrid"
LAST_STEPS = 5
"""Over which the end of a training is averaged."""


@dataclass(frozen=True)
class ThinkingArm:
    """`settings`: overrides of conf/demo_explang.yaml. `think_in`: of the final questions, None where the policy
    chooses."""

    name: str
    label: str
    settings: tuple[str, ...] = ()
    think_in: str | None = None


def _all_forced(rollouts: int) -> tuple[str, ...]:
    return (
        "router=en_dominant",
        "router.mix.en=1",
        "~router.mix.uniform",
        "router.reserved_slots=0",
        f"mode.forced_rollouts={rollouts}",
    )


def thinking_arms(rollouts: int) -> dict[str, ThinkingArm]:
    """By name; `rollouts` of a question."""
    half = ("router.reserved_slots=0", f"mode.forced_rollouts={rollouts // 2}")
    return {
        arm.name: arm
        for arm in (
            ThinkingArm(ENGLISH, "GRPO, thinks in English", _all_forced(rollouts), "en"),
            ThinkingArm(CHOOSES, "ExpLang"),
            ThinkingArm(PROPOSED, "ExpLang, half proposed by the router", half),
        )
    }


@dataclass(frozen=True)
class Thinking:
    """A run. Of the final questions: `accuracy`; `accuracy_strict`, where an answer that does not think in its tag's
    language is wrong; `compliance` of tags of seen languages; `tokens`, the mean; `chosen`, the share of each tag. Of
    the training, step by step: `trained_accuracy`; `trained_compliance`, of seen languages; `languages`, as many
    equally frequent ones as have the entropy of those that the policy chose, None where it never did. `exploring`: the
    number of its first steps that are exploration."""

    arm: str
    seed: int
    steps: int
    rollouts: int
    questions: int
    accuracy: float
    accuracy_strict: float
    compliance: float | None
    tokens: float
    chosen: dict[str, float]
    trained_accuracy: list[float]
    trained_compliance: list[float | None]
    languages: list[float] | None
    exploring: int
    processor_seconds: float


def read_run(
    arm: ThinkingArm, seed: int, evaluation: Path, task: str, run_dir: Path | None, seconds: float
) -> Thinking:
    """Of what nemo_lrpo.evaluate and nemo_lrpo.train left; without `run_dir` of the model before training."""
    measured = json.loads(evaluation.read_text(encoding="utf-8"))["metrics"]
    steps = [] if run_dir is None else _steps(run_dir / "metrics.jsonl")
    free = [step for step in steps if _own(step, "languages_effective") is not None]
    prefix = f"{task}/{EXPLANG}/"
    counts = {
        name.removeprefix(f"{prefix}count/"): value
        for name, value in measured.items()
        if name.startswith(f"{prefix}count/") and len(name.removeprefix(f"{prefix}count/")) == 2
    }
    total = sum(counts.values())
    return Thinking(
        arm=arm.name,
        seed=seed,
        steps=len(steps),
        rollouts=round(sum(step["count"] for step in steps)),
        questions=round(measured[f"{task}/count"]),
        accuracy=measured[f"{prefix}accuracy"],
        accuracy_strict=measured[f"{prefix}accuracy_strict"],
        compliance=measured.get(f"{prefix}compliance/seen"),
        tokens=measured[f"{prefix}tokens"],
        chosen={language: count / total for language, count in sorted(counts.items())},
        trained_accuracy=[_own(step, "accuracy") for step in steps],
        trained_compliance=[_own(step, "compliance/seen") for step in steps],
        languages=[_own(step, "languages_effective") for step in steps] if steps and len(free) == len(steps) else None,
        exploring=round(sum(_own(step, "exploration") for step in steps)),
        processor_seconds=seconds,
    )


def _steps(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        records = [json.loads(line) for line in file]
    return [record for record in records if record["kind"] == "train"]


def _own(step: Mapping[str, Any], name: str) -> Any:
    return step.get(f"{EXPLANG}/{name}")


def figures_of(run: Thinking) -> dict[str, float]:
    """Single numbers of a run, by name: what is averaged over seeds."""
    names = ("accuracy", "accuracy_strict", "compliance", "tokens")
    # Without a tag of a seen language there is no such compliance.
    found = {name: value for name in names if (value := getattr(run, name)) is not None}
    if run.steps:
        if known := [value for value in run.trained_compliance[-LAST_STEPS:] if value is not None]:
            found["sampled_compliance"] = fmean(known)
        found["seconds"] = run.processor_seconds
    if run.languages is not None:
        explored = run.languages[: run.exploring] or run.languages
        found["languages_first"] = run.languages[0]
        found["languages_explored"] = max(explored)
        found["languages_last"] = fmean(run.languages[-LAST_STEPS:])
    return found


class Runs(KeptRuns[Thinking]):
    """The runs of tools/reproduce_explang.py."""

    def __init__(self, path: Path) -> None:
        """See KeptRuns."""
        super().__init__(path, _thinking, "tools/reproduce_explang.py")


def _thinking(record: Mapping[str, Any]) -> Thinking:
    return Thinking(**{field.name: record[field.name] for field in fields(Thinking)})


COLUMNS = (
    ("accuracy", "accuracy", 3),
    ("accuracy_strict", "in the tag's language", 3),
    ("compliance", "compliance", 3),
    ("sampled_compliance", "of rollouts", 3),
    ("languages_first", "languages at first", 1),
    ("languages_explored", "most in exploration", 1),
    ("languages_last", "in the end", 1),
    ("tokens", "tokens", 1),
    ("seconds", "processor s", 0),
)
COMPARED = ("accuracy", "accuracy_strict")
"""(figure, its heading, decimals)"""


def table(runs: Runs, arms: Sequence[ThinkingArm], before: str) -> str:
    """Markdown: the model `before` training, then an arm a row; differences are to ENGLISH, paired by seed. Columns
    "languages": as many equally frequent ones as have the entropy of those that the rollouts chose."""
    lines = head(["", *(heading for _, heading, _ in COLUMNS)])
    baseline = {run.seed: figures_of(run) for run in runs.of(ENGLISH)}
    first = runs.of(before)
    if first:
        found = figures_of(first[0])
        lines.append(row(["cold start", *(_number(found.get(name), digits) for name, _, digits in COLUMNS)]))
    for arm in arms:
        own = {run.seed: figures_of(run) for run in runs.of(arm.name)}
        cells = []
        for name, _, digits in COLUMNS:
            values = {seed: found[name] for seed, found in own.items() if name in found}
            cell = plus_minus(estimate(list(values.values())), digits) if values else ""
            if name in COMPARED and arm.name != ENGLISH and baseline.keys() & values.keys():
                other = {seed: found[name] for seed, found in baseline.items()}
                cell += f" ({plus_minus(paired(values, other), digits, '+')})"
            cells.append(cell)
        lines.append(row([arm.label, *cells]))
    return "\n".join(lines)


def draw(runs: Runs, arms: Sequence[ThinkingArm], path: Path) -> None:
    """SVG, the same bytes for the same runs: accuracy and number of chosen languages by step, a line a seed."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "thinking", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.0, 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        accuracy, languages = figure.subplots(1, 2)
        for number, arm in enumerate(arms):
            for index, run in enumerate(runs.of(arm.name)):
                steps = range(1, run.steps + 1)
                label = arm.label if index == 0 else None
                accuracy.plot(steps, run.trained_accuracy, color=f"C{number}", alpha=0.7, linewidth=1, label=label)
                if run.languages is not None:
                    languages.plot(steps, run.languages, color=f"C{number}", alpha=0.7, linewidth=1)
                    languages.axvline(run.exploring + 0.5, color="0.6", linestyle=":")
        accuracy.set_title("accuracy of the rollouts", fontsize=9)
        accuracy.legend(fontsize=8)
        languages.set_title("thinking languages chosen (exp of the entropy); dotted: exploration ends", fontsize=9)
        for axes in (accuracy, languages):
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def chosen_line(runs: Runs, arm: ThinkingArm, most: int = 6) -> str:
    """In words: the thinking languages of the final answers over all seeds, the most frequent first."""
    shares: dict[str, float] = {}
    found = runs.of(arm.name)
    for run in found:
        for language, share in run.chosen.items():
            shares[language] = shares.get(language, 0.0) + share / len(found)
    order = sorted(shares, key=lambda language: (-shares[language], language))[:most]
    return ", ".join(f"{language} {shares[language]:.2f}" for language in order)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
