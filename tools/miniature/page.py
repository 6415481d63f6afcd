"""Results for readers: a table as Markdown, a figure, and the block of a README that holds both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tools.miniature.arms import ARMS, BASELINE
from tools.miniature.kept import ResultsError
from tools.miniature.outcomes import BASE, Outcome, Results
from tools.miniature.statistics import Summary, figures, language_groups, summarise
from tools.miniature.text import head, plus_minus, row, write_block, write_whole

BLOCK = "reproduce"
"""In the README."""
FIGURE = "reproduce.svg"
PICTURE = f"tools/miniature/{FIGURE}"
"""The figure as the README shows it."""
COLUMNS = (
    ("accuracy", "accuracy", 3),
    ("accuracy_asked", "in trained languages", 3),
    ("accuracy_unasked", "in others", 3),
    ("reward", "reward", 3),
    ("wrong_language", "wrong language", 3),
    ("knowing", "rollouts in a knowing language", 3),
)
"""(figure, its heading, decimals)"""
DEFAULT = "default"
COMPARED = ("accuracy", "reward", "wrong_language", "knowing_drawn", "asked_drawn")
GROUPS = ("rich", "middle", "poor")


def write_all(results: Results, out: Path, readme: Path | None) -> list[str]:
    """Write OUT/results.md and the figure, and the block of `readme`, the figure beside it. Returns lines for the
    terminal. Raises ResultsError where no run is done, or `readme` has no such block."""
    summaries = summaries_of(results)
    if not summaries:
        raise ResultsError(f"{results.path}: no run is done yet.")
    text = block(results, summaries)
    out.mkdir(parents=True, exist_ok=True)
    draw(results, summaries, out / FIGURE)
    write_whole(out / "results.md", f"{text}\n\n{details(results, summaries)}\n")
    if readme is not None:
        picture = readme.parent / PICTURE
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes((out / FIGURE).read_bytes())
        body = f"{text}\n\n![Accuracy and reward of every arm and seed, and routed share by step]({PICTURE})"
        write_block(readme, BLOCK, body)
    return [text, "", f"{out / 'results.md'}, {out / FIGURE}"]


def summaries_of(results: Results) -> list[Summary]:
    """Of the arms that have runs, in the order of ARMS."""
    baseline = results.of(BASELINE)
    return [summarise(name, own, baseline) for name in ARMS if (own := results.of(name))]


def block(results: Results, summaries: Sequence[Summary]) -> str:
    """What was run, in a sentence, and the table."""
    first = next(outcome for summary in summaries for outcome in results.of(summary.arm))
    assert first.training is not None
    seeds = sorted({len(summary.seeds) for summary in summaries})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    asked, languages = first.training.asked, list(first.measure.accuracy)
    where = "" if asked == languages else f" Trained on questions in {', '.join(asked)}."
    intro = (
        f"{counted} seeds of {len(first.training.rewards)} steps, {first.training.rollouts:,} rollouts a run.{where} "
        f"Measured on {first.measure.answers:,} answers to {first.measure.questions:,} questions about other facts, in "
        f"{len(languages)} languages. Mean over seeds ± half of its 95 % interval; in brackets the difference to GRPO, "
        "paired by seed:"
    )
    return f"{intro}\n\n{table(results, summaries)}"


def table(results: Results, summaries: Sequence[Summary]) -> str:
    """Markdown: the base model, then an arm a row."""
    columns = [column for column in COLUMNS if any(column[0] in summary.figures for summary in summaries)]
    headings = ["", *(heading for _, heading, _ in columns), "tokens", "processor s"]
    lines = head(headings)
    for outcome in results.of(BASE)[:1]:
        found = figures(outcome)
        cells = [f"{found[name]:.{digits}f}" if name in found else "" for name, _, digits in columns]
        lines.append(row(["base model", *cells, "", ""]))
    for summary in summaries:
        cells = [_cell(summary, name, digits) for name, _, digits in columns]
        cells += [f"{summary.figures[name].mean:,.0f}" for name in ("tokens", "processor_seconds")]
        lines.append(row([ARMS[summary.arm].label, *cells]))
    return "\n".join(lines)


def details(results: Results, summaries: Sequence[Summary]) -> str:
    """By groups of languages, where the router's rollouts went, and which differences between arms are apart from 0."""
    some = results.of(summaries[0].arm)[0]
    groups = language_groups(some.measure.taught)
    columns = [(f"accuracy_{name}", f"{name} ({' '.join(groups[name])})") for name in GROUPS if groups[name]]
    columns += [("known", "known questions"), ("unknown", "others"), ("true_somewhere", "true in any language")]
    lines = [
        "Accuracy in the languages that the base model was taught most in, and least; of questions that it was taught "
        "in their language, and of others; the share of answers that are true in any language:",
        "",
        *head(["", *(heading for _, heading in columns)]),
    ]
    for summary in summaries:
        lines.append(row([ARMS[summary.arm].label, *(_cell(summary, name, 3) for name, _ in columns)]))
    languages = list(some.measure.accuracy)
    lines += [
        "",
        "Share of the drawn rollouts by language; in languages that know the fact, and that training asks in:",
        "",
    ]
    lines += head(["", *languages, "knowing", "asked in"])
    for summary in summaries:
        if "knowing_drawn" in summary.figures:
            shares = drawn_shares(results.of(summary.arm))
            cells = [f"{shares.get(language, 0.0):.3f}" for language in languages]
            cells += [f"{summary.figures[name].mean:.3f}" for name in ("knowing_drawn", "asked_drawn")]
            lines.append(row([ARMS[summary.arm].label, *cells]))
    lines += ["", "Differences, paired by seed, with 95 % intervals:", ""]
    lines += comparisons(results, [summary.arm for summary in summaries])
    return "\n".join(lines)


def comparisons(results: Results, arms: Sequence[str]) -> list[str]:
    """A list of what each arm has beyond GRPO, and what the default has beyond each of the others."""
    lines = []
    pairs = [(arm, BASELINE) for arm in arms] + [(DEFAULT, arm) for arm in arms]
    for arm, other in dict.fromkeys(pairs):
        if arm == other or arm not in arms:
            continue
        summary = summarise(arm, results.of(arm), results.of(other))
        for name in COMPARED:
            found = summary.differences.get(name)
            if found is not None and found.count > 1:
                apart = "apart from 0" if found.apart else "not apart from 0"
                lines.append(
                    f"- {ARMS[arm].label} - {ARMS[other].label}, {name}: {found.mean:+.4f} ({found.low:+.4f} to "
                    f"{found.high:+.4f}, {found.count} seeds), {apart}"
                )
    return lines


def drawn_shares(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """By language, of the rollouts that the router drew over all `outcomes`."""
    totals: dict[str, int] = {}
    for outcome in outcomes:
        for language, count in (outcome.training.drawn if outcome.training else {}).items():
            totals[language] = totals.get(language, 0) + count
    everything = sum(totals.values())
    return {language: count / everything for language, count in sorted(totals.items())}


def draw(results: Results, summaries: Sequence[Summary], path: Path) -> None:
    """SVG, the same bytes for the same results: accuracy and reward of every arm with interval and seeds; the share of
    rollouts in languages that know the fact, by step."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours = {name: f"C{number}" for number, name in enumerate(ARMS)}
    with matplotlib.rc_context({"svg.hashsalt": "reproduce", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10.5, 1.0 + 0.33 * max(len(summaries), 6)), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
        for axes, name in zip(panels, ("accuracy", "reward")):
            for height, summary in enumerate(summaries):
                own = [figures(outcome)[name] for outcome in results.of(summary.arm)]
                half = summary.figures[name].half
                error, colour = None if math.isnan(half) else half, colours[summary.arm]
                axes.errorbar(summary.figures[name].mean, height, xerr=error, fmt="o", color=colour, capsize=3)
                axes.plot(own, [height + 0.25] * len(own), "|", color=colour, alpha=0.6)
            for outcome in results.of(BASE)[:1]:
                axes.axvline(figures(outcome)[name], color="0.6", linestyle=":")
            labels = [ARMS[summary.arm].label if axes is panels[0] else "" for summary in summaries]
            axes.set_yticks(range(len(summaries)), labels)
            axes.invert_yaxis()
            axes.set_xlabel(f"{name}, mean of languages")
        for summary, label in zip(summaries, panels[0].get_yticklabels()):
            label.set_color(colours[summary.arm])
            steps = zip(*(o.training.knowing_by_step for o in results.of(summary.arm) if o.training))
            means = [sum(step) / len(step) for step in steps]
            panels[2].plot(range(1, len(means) + 1), means, color=colours[summary.arm])
        panels[2].set_xlabel("step")
        panels[2].set_title("rollouts in a language that knows the fact", fontsize=9)
        panels[0].set_title("bars: 95 %; ticks: seeds; dotted: before", fontsize=9, loc="left")
        for axes in panels:
            axes.grid(alpha=0.3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _cell(summary: Summary, name: str, digits: int) -> str:
    if name not in summary.figures:
        return ""
    text = plus_minus(summary.figures[name], digits)
    difference = summary.differences.get(name)
    if summary.arm == BASELINE or difference is None:
        return text
    return f"{text} ({plus_minus(difference, digits, '+')})"
