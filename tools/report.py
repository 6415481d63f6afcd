"""A run as a page of Markdown with plots: what training brought, per language, and what the router learned.

    python tools/report.py --run results/demo/run --before before.json --after after.json --out results/demo/report

Reads metrics.jsonl, config.yaml and the router's state (newest checkpoint or model.nemo) of the run, and two
evaluations by nemo_lrpo.evaluate of the same questions. Writes report.md and PNG plots into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nemo_lrpo.data.errors import DataError  # noqa: E402
from nemo_lrpo.data.reader import read_prompts  # noqa: E402
from nemo_lrpo.types import Prompt  # noqa: E402
from tools.plot_router import draw_heat_map, heat_maps  # noqa: E402
from tools.saved_router import Rebuilt, SavedRouterError, Source, read_source, rebuild  # noqa: E402

Records = list[dict[str, Any]]

ASKED = 200
"""Training questions of each topic and region."""


class ReportError(ValueError):
    """An input is missing or is not what the tool that writes it would have written."""


@dataclass(frozen=True)
class Gain:
    """Mean reward of one language before and after, over the same questions, with a 95 % interval of the difference."""

    language: str
    count: int
    before: float
    after: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.after - self.before


def read_lines(path: Path) -> Records:
    """A file of JSON objects, one a line. Raises ReportError naming the file and the line."""
    if not path.is_file():
        raise ReportError(f"{path}: no such file.")
    records = []
    # Not splitlines: a text may hold other characters that end lines.
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ReportError(f"{path}:{number}: not JSON ({error}).") from error
    return records


def gains(before: Records, after: Records, samples: int = 2000) -> list[Gain]:
    """By language and, first, over all (`all`): paired by sample id, percentile bootstrap over questions."""
    rewards = {record["sample_id"]: record for record in before if record["score"]}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for record in after:
        other = rewards.get(record["sample_id"])
        if other is not None and record["score"]:
            pair = (other["score"]["reward"], record["score"]["reward"])
            pairs.setdefault("all", []).append(pair)
            pairs.setdefault(record["language"], []).append(pair)
    if not pairs:
        raise ReportError("the two evaluations share no scored question.")
    generator = np.random.default_rng(0)
    result = []
    for language in ["all", *sorted(set(pairs) - {"all"})]:
        values = np.array(pairs[language])
        difference = values[:, 1] - values[:, 0]
        means = difference[generator.integers(len(difference), size=(samples, len(difference)))].mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        mean = values.mean(axis=0)
        result.append(Gain(language, len(values), float(mean[0]), float(mean[1]), float(low), float(high)))
    return result


def series(records: Records, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was logged."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float], window: int = 5) -> np.ndarray:
    """Running mean over the last `window` values."""
    return np.array([np.mean(values[max(0, index - window + 1) : index + 1]) for index in range(len(values))])


def plot_gains(rows: Sequence[Gain], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 3.6))
    positions = np.arange(len(rows))
    axes.bar(positions - 0.2, [row.before for row in rows], 0.4, label="base model", color="#9aa5b1")
    axes.bar(positions + 0.2, [row.after for row in rows], 0.4, label="after LRPO", color="#2f6fb0")
    axes.set_xticks(positions, [row.language for row in rows])
    axes.set_ylabel("mean reward, test questions")
    axes.legend()
    _save(figure, path)


def plot_training(train: Records, validation: Records, path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.4))
    for axes, (key, title) in zip(panels, (("reward", "reward"), ("gate", "gate rate"), ("ended", "ended"))):
        steps, values = series(train, key)
        axes.plot(steps, values, color="#c3d3e6", linewidth=1)
        axes.plot(steps, smooth(values), color="#2f6fb0", label="rollouts, mean of 5 steps")
        steps, values = series(validation, key)
        axes.plot(steps, values, "o-", color="#c0504d", label="validation")
        axes.set_title(title)
        axes.set_xlabel("step")
    panels[0].legend()
    _save(figure, path)


def plot_router(train: Records, path: Path) -> None:
    """What slots were drawn from, over the steps."""
    keys = sorted({key for record in train for key in record if key.startswith("router/probability/")})
    figure, axes = plt.subplots(figsize=(9, 4))
    colours = plt.get_cmap("tab20").colors
    for index, key in enumerate(keys):
        steps, values = series(train, key)
        axes.plot(steps, values, label=key.rpartition("/")[2], color=colours[index % len(colours)])
    axes.axhline(1 / max(1, len(keys)), color="black", linewidth=0.8, linestyle="--", label="uniform")
    axes.set_xlabel("step")
    axes.set_ylabel("mean probability of a drawn slot")
    axes.legend(ncol=8, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.18))
    _save(figure, path)


def movement(train: Records) -> tuple[float, list[tuple[str, float]]]:
    """How far the router is from uniform at the end (total variation), and its languages by probability."""
    last = next((r for r in reversed(train) if any(k.startswith("router/probability/") for k in r)), None)
    if last is None:
        return 0.0, []
    shares = {k.rpartition("/")[2]: v for k, v in last.items() if k.startswith("router/probability/")}
    distance = 0.5 * sum(abs(share - 1 / len(shares)) for share in shares.values())
    return distance, sorted(shares.items(), key=lambda item: -item[1])


def knowledge_table(
    rebuilt: Rebuilt, contexts: Mapping[str, Sequence[Prompt]], knowledge: Mapping[str, Sequence[str]]
) -> list[str]:
    """By topic and region: the probability of the languages that know its facts in slots that are not reserved, mean
    over `contexts`, the questions to ask about by name; uniform would give them their share of the languages."""
    languages = rebuilt.router.languages
    lines = ["| topic or region | languages that know it | uniform | router |", "|---|---|---:|---:|"]
    shares = []
    for name, prompts in contexts.items():
        knowing = [language for language in languages if language in knowledge.get(name, ())]
        free = [prompt for prompt in prompts if rebuilt.fixed_topics.isdisjoint(prompt.topics)]
        if not knowing or not free:
            continue
        mean = np.mean([rebuilt.router.distribution(prompt) for prompt in free], axis=0)
        share = float(sum(mean[languages.index(language)] for language in knowing))
        shares.append((len(knowing) / len(languages), share))
        lines.append(f"| {name} | {', '.join(knowing)} | {shares[-1][0]:.3f} | {share:.3f} |")
    uniform, learned = np.mean(shares, axis=0) if shares else (0.0, 0.0)
    lines.append(f"| mean | | {uniform:.3f} | {learned:.3f} |")
    return lines


def asked_about(source: Source, rebuilt: Rebuilt) -> dict[str, list[Prompt]]:
    """By topic and region: training questions that name it, at most ASKED of each, or, where they are not at hand, one
    of every topic without and with each region."""
    router = rebuilt.router
    data = None if source.config is None else source.config[1].get("data")
    if data is not None and data.get("train") and Path(data.train).exists():
        prompts = read_prompts(data.train, list(router.languages))
    else:
        languages = router.languages[:1]
        places = [(t, ()) for t in router.topics] + [(t, (g,)) for g in router.regions for t in router.topics]
        prompts = [Prompt(f"{t}/{g}", "", "", x, x, (t,), g) for t, g in places for x in languages]
    found: dict[str, list[Prompt]] = {name: [] for name in [*router.topics, *router.regions]}
    for prompt in prompts:
        for name in (*prompt.topics, *prompt.regions):
            found.setdefault(name, []).append(prompt)
    return {name: own[:: math.ceil(len(own) / ASKED) or 1] for name, own in found.items()}


def drawn_reward(train: Records, first: int, last: int) -> float:
    """Mean reward of the rollouts of steps first..last (1-based, inclusive)."""
    values = [record["reward"] for record in train if first <= record["step"] <= last and "reward" in record]
    return float(np.mean(values)) if values else float("nan")


def write(run: Path, before: Path, after: Path, out: Path, knowledge: dict[str, list[str]] | None = None) -> Path:
    """Write the report; returns the path of report.md."""
    records = read_lines(run / "metrics.jsonl")
    train = [record for record in records if record.get("kind") == "train"]
    validation = [record for record in records if record.get("kind") == "validation"]
    if not train:
        raise ReportError(f"{run / 'metrics.jsonl'}: no training step was logged.")
    before_answers, after_answers = (read_lines(path.with_suffix(".jsonl")) for path in (before, after))
    rows = gains(before_answers, after_answers)
    out.mkdir(parents=True, exist_ok=True)
    plot_gains(rows, out / "languages.png")
    plot_training(train, validation, out / "training.png")
    plot_router(train, out / "router.png")
    source = read_source(run)
    rebuilt = None if source.state is None else rebuild(source)
    maps = [] if rebuilt is None else list(heat_maps(rebuilt))
    for heat_map in maps:
        (out / f"{heat_map.name}.png").write_bytes(draw_heat_map(heat_map))

    whole, languages = rows[0], rows[1:]
    better = sum(row.difference > 0 for row in languages)
    distance, shares = movement(train)
    window = max(1, len(train) // 5)
    lines = [
        "# LRPO: report of a run",
        "",
        f"{len(train)} steps; {int(train[-1]['count'])} rollouts a step.",
        "",
        "## Held-out questions, before and after",
        "",
        f"Mean reward {whole.before:.3f} -> {whole.after:.3f} "
        f"(difference {whole.difference:+.3f}, 95 % interval {whole.low:+.3f} to {whole.high:+.3f}, "
        f"{whole.count} questions); better in {better} of {len(languages)} languages.",
        "",
        "| language | questions | base | after | difference | 95 % interval |",
        "|---|---:|---:|---:|---:|---|",
        *(
            f"| {row.language} | {row.count} | {row.before:.3f} | {row.after:.3f} | {row.difference:+.3f} "
            f"| {row.low:+.3f} to {row.high:+.3f} |"
            for row in rows
        ),
        "",
        "![reward by language](languages.png)",
        "",
        "## Training",
        "",
        f"Mean reward of the rollouts: {drawn_reward(train, 1, window):.3f} in the first {window} steps, "
        f"{drawn_reward(train, len(train) - window + 1, len(train)):.3f} in the last {window}.",
        "",
        "![training curves](training.png)",
        "",
        "## Router",
        "",
        f"Distance from uniform at the end (total variation): {distance:.3f}. Most drawn: "
        + ", ".join(f"{language} {share:.3f}" for language, share in shares[:5])
        + ".",
        "",
        "![probabilities](router.png)",
        "",
    ]
    for heat_map in maps:
        lines += [f"{heat_map.title}:", "", f"![{heat_map.title}]({heat_map.name}.png)", ""]
    if rebuilt is not None and knowledge:
        lines += [
            "What it learned against what the base model was taught: the probability of languages that know.",
            "",
            *knowledge_table(rebuilt, asked_about(source, rebuilt), knowledge),
            "",
        ]
    lines += ["## Seconds of a step", "", "| part | median | share |", "|---|---:|---:|"]
    parts = sorted({key for record in train for key in record if key.startswith("time/")} - {"time/step"})
    total = float(np.median([record["time/step"] for record in train]))
    for key in parts:
        median = float(np.median([record.get(key, 0.0) for record in train]))
        lines.append(f"| {key.partition('/')[2]} | {median:.3f} | {100 * median / total:.1f} % |")
    lines += [f"| all | {total:.3f} | |", "", "## Answers", ""]
    lines += sample_table(before_answers, after_answers)
    path = out / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def sample_table(before: Records, after: Records) -> list[str]:
    """The first question of each language, answered by both models."""
    previous = {record["sample_id"]: record for record in before}
    lines = ["| language | question | reference | base | after |", "|---|---|---|---|---|"]
    seen = set()
    for record in after:
        if record["language"] in seen or record["sample_id"] not in previous:
            continue
        seen.add(record["language"])
        answers = (previous[record["sample_id"]], record)
        cells = [
            f"{answer['response']} ({answer['score']['reward']:.2f})" if answer["score"] else answer["response"]
            for answer in answers
        ]
        row = [record["language"], record["question"], record["reference"], *cells]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    return lines


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run_dir of nemo_lrpo.train")
    parser.add_argument("--before", type=Path, required=True, help="evaluation of the base model (JSON)")
    parser.add_argument("--after", type=Path, required=True, help="evaluation of the trained model (JSON)")
    parser.add_argument("--out", type=Path, required=True, help="directory of the report")
    parser.add_argument("--knowledge", type=Path, help="JSON: by topic or region, the languages that know its facts")
    options = parser.parse_args(arguments)
    try:
        knowledge = json.loads(options.knowledge.read_text(encoding="utf-8")) if options.knowledge else None
        path = write(options.run, options.before, options.after, options.out, knowledge)
    except (ReportError, SavedRouterError, DataError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(path)


if __name__ == "__main__":
    main()
