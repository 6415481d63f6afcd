"""A report's page: its parts put together from runs and evaluations, and the template that lays them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from nemo_lrpo.data.errors import DataError
from tools.plot_router import heat_maps
from tools.reporting.charts import COLOURS, SMALL, Line, Series, forest, limits, line_chart, trend
from tools.reporting.evaluations import ALL, MACRO, Answers, Gain, gains, question_rewards
from tools.reporting.measures import GROUPS, Evaluated, Table, tables
from tools.reporting.routing import (
    PROBABILITY,
    Cells,
    Known,
    asked_about,
    cells,
    known,
    movement,
    shades,
    training_questions,
)
from tools.reporting.runs import Run, series_of
from tools.reporting.thinking import CURVES as THINKING_CURVES
from tools.reporting.thinking import chosen, in_explang, proposes, thinking_languages, thinking_rows
from tools.saved_router import SavedRouterError, rebuild

SHOWN_LANGUAGES = 24
"""With a chart each; of more, those with the most rollouts."""
SHOWN_SETTINGS = 40
"""Settings in which runs differ."""
LONGEST = 1500
"""Characters of a text; what is longer is cut, and says so."""

CURVES = (
    ("reward", "Reward", "mean over the rollouts of a step; dots: validation"),
    ("gate", "Gate rate", "share of answers in the requested language; dots: validation"),
    ("quality", "Quality", "mean before the gate; dots: validation"),
    ("length", "Length", "tokens of an answer; dots: validation"),
    ("ended", "Ended", "share of answers that end by themselves; dots: validation"),
    ("policy/surprisal", "Entropy of the policy", "mean surprisal of the sampled tokens, nats"),
    ("policy/kl_loss", "KL to the initial policy", "mean over tokens, nats"),
    ("groups/reward_std", "Spread within groups", "standard deviation of the rewards of a question"),
    ("groups/zero_variance", "Groups without spread", "questions of a step whose answers all earned the same"),
    ("policy/grad_norm", "Gradient norm", "before clipping"),
    ("missing", "Missing rewards", "rollouts of a step that the reward server left without a reward"),
    ("loss", "Loss", "mean over the pairs or traces of a step; dots: validation"),
    ("accuracy", "Pairs told apart", "share whose chosen answer gained more probability; dots: validation"),
    ("margin", "Margin", "mean of what the loss of the pairs compares; dots: validation"),
    ("chosen_change", "Chosen answers", "log-probability, less that under the initial policy, nats; dots: validation"),
    (
        "rejected_change",
        "Rejected answers",
        "log-probability, less that under the initial policy, nats; dots: validation",
    ),
)
BY_LANGUAGE = (
    ("reward", "Reward by language"),
    ("gate", "Gate rate by language"),
    ("length", "Length by language"),
    ("accuracy", "Pairs told apart by language"),
)
EXPLANG_REWARD = (
    "mean over the rollouts of a step; dots: validation. In mode=explang two quantities: in training the weighted sum "
    "that the policy learns from, in validation r_c * r_v (compliance times correctness)"
)
SETTINGS = (
    "router.name",
    "pretrained_checkpoint.restore_from_path",
    "data.train",
    "trainer.lrpo.max_steps",
    "trainer.lrpo.prompts_per_step",
    "trainer.lrpo.rollouts_per_prompt",
    "algorithm.kl_coefficient",
    "rollout.temperature",
    "rollout.backend",
    "seed",
)


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    svg: Markup


class Ends(NamedTuple):
    """Means over the first and over the last fifth of a run's steps."""

    first: float
    last: float


@dataclass(frozen=True)
class Fact:
    """A row of the overview: one value per run, as text."""

    name: str
    values: list[str]


@dataclass(frozen=True)
class Comparison:
    """A task: by run what it brought, and, of runs after the first, their difference to the first. tables: what the
    evaluations' results say besides."""

    task: str
    before: dict[int, list[Gain]]
    against_first: dict[int, list[Gain]]
    chart: Markup | None
    after_only: dict[int, list[tuple[str, int, float]]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Routed:
    """What the router of a run learned; `known_mean`: uniform's and the router's mean over `known`. asked: about
    what. draws: whether it has a say at all."""

    run: int
    maps: list[Cells]
    known: list[Known]
    known_mean: tuple[float, float]
    asked: str
    movement: tuple[float, list[tuple[str, float]]] | None
    draws: bool = True


@dataclass(frozen=True)
class Part:
    name: str
    seconds: list[float]
    shares: list[float]


def render(
    runs: Sequence[Run],
    before: Sequence[Answers | None],
    after: Sequence[Answers | None],
    knowledge: Mapping[str, Sequence[str]] | None = None,
    results: Sequence[Evaluated] = (),
) -> str:
    """The page. before, after: the answers of an evaluation per run, or None. results: what evaluations, of the same or
    some of them, say of each task."""
    notes = [(run.name, note) for run in runs for note in run.notes]
    routers = [_routed(number, run, knowledge or {}, notes) for number, run in enumerate(runs)]
    comparisons = _comparisons(before, after, results)
    progress = _progress(runs)
    if not any(after):
        unknown = "" if progress else ": what training brought was not measured"
        notes.append(("", f"No evaluation was given (--before, --after){unknown}."))
    elif not all(one for pair in zip(before, after) for one in pair):
        notes.append(("", "Not every run has an evaluation before and after."))
    languages, left_out = _languages(runs)
    if left_out:
        notes.append(
            ("", f"Charts are of the {len(languages)} languages with the most rollouts; {left_out} are not shown.")
        )
    uniform = 1 / max(1, len({x for run in runs for x in run.languages}))
    probability = PROBABILITY.rstrip("/")
    entropy = ("router/entropy", "Entropy of drawn slots", "nats; dashed: uniform", -math.log(uniform))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number_text, "percent": percent, "arrow": arrow, "clip": clip}
    return environment.get_template("page.html").render(
        runs=runs,
        colours=COLOURS,
        shades=shades(),
        notes=notes,
        facts=_overview(runs, comparisons),
        comparisons=comparisons,
        names=(ALL, MACRO),
        metrics={task: tree["metric"] for one in results for task, tree in one.tasks.items()},
        progress=progress,
        curves=[_figure(runs, *_noted(runs, one)) for one in CURVES if any(_logged(run, one[0]) for run in runs)],
        by_language=[
            (title, _noted(runs, (key, title, ""))[2], _small(runs, languages, key))
            for key, title in BY_LANGUAGE
            if languages and _any(runs, languages, key)
        ],
        rows=[(run, _language_rows(run)) for run in runs],
        thinking=[(run, found) for run in runs if (found := thinking_rows(run))],
        thinking_curves=[_figure(runs, *one) for one in THINKING_CURVES if any(_logged(run, one[0]) for run in runs)],
        selected=_small(runs, thinking_languages(runs)[:SHOWN_LANGUAGES], "explang/selected", read=chosen),
        entropy=_figure(runs, *entropy) if any(_logged(run, entropy[0]) for run in runs) else None,
        drawn=_small(runs, languages, probability, uniform) if _any(runs, languages, probability) else [],
        routers=routers,
        samples=_samples(runs, before, after),
        parts=_parts(runs),
        settings=_settings(runs),
        window=_windows(runs),
    )


# --- what the sections show ---------------------------------------------------------------------------------------


def ends(run: Run, key: str) -> Ends:
    """Means over the first and the last fifth of the steps, NaN where nothing was logged."""
    values = run.series(key)[1]
    count = max(1, len(values) // 5)
    return Ends(
        *(float(np.nanmean(x)) if np.isfinite(x).any() else math.nan for x in (values[:count], values[-count:]))
    )


def _overview(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> list[Fact]:
    facts = [
        Fact("router", [_router_name(run) for run in runs]),
        Fact("steps", [str(len(run.train)) for run in runs]),
        Fact("rollouts a step", [_last(run, "count") for run in runs]),
    ]
    for comparison in comparisons:
        label = f"evaluation {comparison.task}" if len(comparisons) > 1 else "evaluation"
        for name, row in ((ALL, 0), (MACRO, 1)):
            values = [
                f"{found[row].before:.3f} → {found[row].after:.3f} ({found[row].difference:+.3f})"
                if found
                else "no evaluation"
                for found in (comparison.before.get(number) for number in range(len(runs)))
            ]
            if comparison.before:
                what = "questions" if name == ALL else "languages"
                facts.append(Fact(f"{label}, mean of {what}", values))
    for key, name, digits in (
        ("reward", "reward of rollouts", 3),
        ("gate", "gate rate", 3),
        ("length", "tokens of an answer", 1),
        ("policy/surprisal", "entropy of the policy", 3),
        ("policy/kl_loss", "KL to the initial policy", 4),
    ):
        facts.append(Fact(f"{name}, first → last fifth", [arrow(ends(run, key), digits) for run in runs]))
    facts.append(Fact("seconds of a step, median", [number_text(_median(run, "time/step")) for run in runs]))
    return facts


def _comparisons(
    before: Sequence[Answers | None], after: Sequence[Answers | None], results: Sequence[Evaluated]
) -> list[Comparison]:
    brought: dict[str, dict[int, list[Gain]]] = {}
    against: dict[str, dict[int, list[Gain]]] = {}
    alone: dict[str, dict[int, list[tuple[str, int, float]]]] = {}
    for number, (old, new) in enumerate(zip(before, after)):
        if new and old:
            for task, rows in gains(old, new).items():
                brought.setdefault(task, {})[number] = rows
        elif new:
            for task, means in _means(new).items():
                alone.setdefault(task, {})[number] = means
        if number and new and after[0]:
            for task, rows in gains(after[0], new).items():
                against.setdefault(task, {})[number] = rows
    measured = {task: tables(task, results) for one in results for task in one.tasks}
    tasks = sorted({*brought, *against, *alone, *(task for task, own in measured.items() if own)})
    return [
        Comparison(
            task,
            brought.get(task, {}),
            against.get(task, {}),
            _forest(brought.get(task, {})),
            alone.get(task, {}),
            measured.get(task, []),
        )
        for task in tasks
    ]


def _forest(by_run: Mapping[int, Sequence[Gain]]) -> Markup | None:
    if not by_run:
        return None
    names = list(dict.fromkeys(gain.language for rows in by_run.values() for gain in rows))
    found = {(number, gain.language): gain for number, rows in by_run.items() for gain in rows}
    count = max(by_run) + 1
    rows = [
        (
            name,
            [
                None if (gain := found.get((number, name))) is None else (gain.difference, gain.low, gain.high)
                for number in range(count)
            ],
        )
        for name in names
    ]
    return forest("difference of the mean reward by language, with 95 % intervals", rows)


def _means(answers: Answers) -> dict[str, list[tuple[str, int, float]]]:
    """By task: language, number of questions and their mean reward; over all first."""
    values: dict[str, dict[str, list[float]]] = {}
    for (task, _), (language, value) in question_rewards(answers).items():
        for name in (ALL, language):
            values.setdefault(task, {}).setdefault(name, []).append(value)
    return {
        task: [(name, len(own[name]), float(np.mean(own[name]))) for name in [ALL, *sorted(set(own) - {ALL})]]
        for task, own in values.items()
    }


def _progress(runs: Sequence[Run]) -> list[Figure]:
    """A chart for each task that was evaluated during training: its mean of languages, seen and unseen ones apart."""
    lines: dict[str, list[Line]] = {}
    for number, run in enumerate(runs):
        keys = dict.fromkeys(key for record in run.evaluation for key in record)
        for name in (key.removesuffix("_macro") for key in keys if key.endswith("_macro")):
            # With no language unseen, the mean of the seen ones is that of all.
            for kind in ("macro", *GROUPS) if f"{name}_unseen" in keys else ("macro",):
                series = series_of(run.evaluation, f"{name}_{kind}")
                if np.isfinite(series[1]).any():
                    lines.setdefault(name, []).append(Line(number, kind, series))
    figures = []
    for name, own in sorted(lines.items()):
        task, _, metric = name.rpartition("/")
        apart = "; dashed: seen in training, dotted: unseen" if any(one.kind == "unseen" for one in own) else ""
        figures.append(Figure(task, f"mean {metric} of the languages{apart}", line_chart(name, own)))
    return figures


def _noted(runs: Sequence[Run], curve: tuple[str, str, str]) -> tuple[str, str, str]:
    """key, title and note of a chart; in mode=explang a reward is not the same in training and validation."""
    key, title, note = curve
    return key, title, EXPLANG_REWARD if key == "reward" and any(map(in_explang, runs)) else note


Read = Callable[[Run, str, bool], Series]
"""Of a run, a metric's values in its training steps or in its validations."""


def _lines(runs: Sequence[Run], key: str, faint: bool = True, read: Read = Run.series) -> list[Line]:
    lines = []
    for number, run in enumerate(runs):
        series = read(run, key, False)
        if faint:
            lines.append(Line(number, "raw", series))
        lines.append(Line(number, "trend", trend(series)[0]))
        steps, values = read(run, key, True)
        if np.isfinite(values).any():
            lines.append(Line(number, "dots", (steps, values)))
    return [line for line in lines if np.isfinite(line.series[1]).any()]


def _figure(runs: Sequence[Run], key: str, title: str, note: str, level: float | None = None) -> Figure:
    return Figure(title, note, line_chart(title, _lines(runs, key), level=level))


def _small(
    runs: Sequence[Run], languages: Sequence[str], key: str, level: float | None = None, read: Read = Run.series
) -> list[Figure]:
    """A chart per language, all with one range."""
    lines = {language: _lines(runs, f"{key}/{language}", False, read) for language in languages}
    common = limits([line for own in lines.values() for line in own], level)
    return [
        Figure(language, "", line_chart(f"{key}, {language}", own, SMALL, level, common))
        for language, own in lines.items()
    ]


def _languages(runs: Sequence[Run]) -> tuple[list[str], int]:
    """Those with a chart, and how many have none."""
    found = {language for run in runs for language in run.languages}
    rollouts = {x: sum(float(np.nansum(run.series(f"count/{x}")[1])) for run in runs) for x in sorted(found)}
    shown = sorted(sorted(found, key=lambda x: -rollouts[x])[:SHOWN_LANGUAGES])
    return shown, len(found) - len(shown)


def _language_rows(run: Run) -> list[dict[str, Any]]:
    total = float(np.nansum(run.series("count")[1]))
    if not total:
        return []
    return [
        {
            "language": language,
            "share": float(np.nansum(run.series(f"count/{language}")[1])) / total,
            **{key: ends(run, f"{key}/{language}") for key in ("reward", "gate", "length")},
        }
        for language in run.languages
    ]


def _routed(number: int, run: Run, knowledge: Mapping[str, Sequence[str]], notes: list[tuple[str, str]]) -> Routed:
    maps, facts, draws = [], [], proposes(run)
    if run.source.state is not None and draws:
        try:
            rebuilt = rebuild(run.source)
            maps = [cells(one) for one in heat_maps(rebuilt)]
            facts = known(rebuilt, asked_about(run.source, rebuilt), knowledge) if knowledge else []
        except (SavedRouterError, DataError) as error:
            notes.append((run.name, f"What its router learned cannot be shown: {error}"))
    mean = np.mean([(one.uniform, one.router) for one in facts], axis=0).tolist() if facts else [math.nan, math.nan]
    own = training_questions(run.source) is not None
    asked = "its training questions" if own else "one question of every topic and region (training questions not found)"
    return Routed(number, maps, facts, (mean[0], mean[1]), asked, movement(run), draws)


def _samples(
    runs: Sequence[Run], before: Sequence[Answers | None], after: Sequence[Answers | None]
) -> dict[str, dict[str, Any]]:
    """By language: the first evaluated question with the answers of all runs, and rollouts of every run."""
    found: dict[str, dict[str, Any]] = {}
    for number, (old, new) in enumerate(zip(before, after)):
        for key, record in (new or {}).items():
            place = found.setdefault(str(record["language"]), {"asked": {}, "rollouts": []})["asked"]
            # The first of each language, whatever came out; the same one of every run.
            if place.get("key", key) == key:
                place |= {"key": key, "record": record, "answers": place.get("answers", [])}
                previous = (old or {}).get(key)
                if previous is not None and (number == 0 or previous is not (before[0] or {}).get(key)):
                    place["answers"].append((number, "before", previous))
                place["answers"].append((number, "after", record))
    for number, run in enumerate(runs):
        for language, records in run.samples.items():
            own = found.setdefault(language, {"asked": {}, "rollouts": []})
            own["rollouts"] += [(number, record) for record in records]
    return dict(sorted(found.items()))


def _parts(runs: Sequence[Run]) -> list[Part]:
    """Median seconds of a step's parts by run, the whole last; what no part claims is `other`."""
    keys = sorted({k for run in runs for record in run.train for k in record if k.startswith("time/")} - {"time/step"})
    whole = [_median(run, "time/step") for run in runs]
    medians = {key.partition("/")[2]: [_median(run, key) for run in runs] for key in keys}
    rest = [total - float(np.nansum([own[i] for own in medians.values()])) for i, total in enumerate(whole)]
    rows = (
        {**medians, "other": [value if math.isnan(value) else max(0.0, value) for value in rest], "step": whole}
        if keys
        else {}
    )
    return [Part(name, own, [100 * s / t if t else math.nan for s, t in zip(own, whole)]) for name, own in rows.items()]


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings that matter most, then those in which the runs differ."""
    trees = [run.settings() for run in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    differ = [k for k in keys if len({repr(tree.get(k)) for tree in trees if tree}) > 1 and k not in SETTINGS]
    shown = [key for key in SETTINGS if key in keys] + differ[:SHOWN_SETTINGS]
    return [(key, [str(tree.get(key, "–")) for tree in trees]) for key in shown]


def _windows(runs: Sequence[Run]) -> str:
    counts = sorted({trend(run.series("reward"))[1] for run in runs if run.train})
    return " or ".join(map(str, counts)) or "5"


# --- small things -------------------------------------------------------------------------------------------------


def number_text(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number for a reader; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def clip(text: str) -> str:
    """At most LONGEST characters of a text."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"


def percent(value: float) -> str:
    """With its sign; a dash where there is none."""
    return f"{value:.1f} %" if math.isfinite(value) else "–"


def arrow(both: Ends, digits: int = 3) -> str:
    """From the first to the last; a dash where there is neither."""
    first, last = number_text(both.first, digits), number_text(both.last, digits)
    return last if first == last == "–" else f"{first} → {last}"


def _router_name(run: Run) -> str:
    return str(run.settings().get("router.name", "not known")) if proposes(run) else "none, the policy chose"


def _last(run: Run, key: str) -> str:
    value = run.train[-1].get(key) if run.train else None
    return "–" if value is None else f"{value:g}"


def _median(run: Run, key: str) -> float:
    values = run.series(key)[1]
    return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan


def _logged(run: Run, key: str) -> bool:
    return any(np.isfinite(run.series(key, validation)[1]).any() for validation in (False, True))


def _any(runs: Sequence[Run], languages: Sequence[str], key: str) -> bool:
    return any(_logged(run, f"{key}/{language}") for run in runs for language in languages)
