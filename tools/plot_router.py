"""What a router has learned, as pictures and as one HTML page that needs nothing but a browser.

    python tools/plot_router.py results/demo/run
    python tools/plot_router.py model.nemo --out router --router published router.temperature.min=0.5

SOURCE is a run directory (metrics.jsonl, config.yaml, and the router's state in the newest checkpoint or in
model.nemo), a checkpoint directory, a .nemo, a router's state as JSON, or a metrics.jsonl alone. A state gives heat
maps of probability and value, topic by language and region by language; a log gives curves over the steps: entropy,
probability, share and value of every language. --out gets the pictures (PNG) and router.html, which holds them all.

Probabilities are what a drawn slot is drawn from at the state's step, exploration included: of a topic for questions
without region, of a region as the mean over all topics. A policy that looks at the question's language is shown as the
mean over question languages, one that looks at its text on an empty one. The settings are those of the run's own
config.yaml; where there is none, or --config or --router are given, those of conf/train.yaml (or demo.yaml) and
conf/router/NAME.yaml. Overrides come on top. Where the log shows that the run had others, the tool stops.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from nemo_lrpo.router.policy import Context  # noqa: E402
from nemo_lrpo.router.router import BanditRouter  # noqa: E402
from nemo_lrpo.types import Prompt  # noqa: E402
from tools.saved_router import (  # noqa: E402
    LOG,
    Rebuilt,
    Record,
    SavedRouterError,
    Source,
    read_source,
    rebuild,
)

Table = NDArray[np.float64]
SHOWN_ROWS = 60
"""Topics or regions of a heat map; of more, those furthest from their mean."""
SHOWN_NAMES = 100
"""Languages that the axis of a heat map names; of more, evenly spaced ones: names take nearly all of the drawing."""
SHOWN_CURVES = 20
"""Languages with a curve; of more, those with the largest last values."""
QUESTION_LANGUAGES = 16
"""Question languages that are averaged over; of more, as many evenly spaced ones."""
LAST_STEPS = 10
"""The table of languages averages the log over so many last steps."""


@dataclass(frozen=True)
class HeatMap:
    """A picture of `values` [rows, L]; NaN is shown in grey."""

    name: str
    title: str
    rows: tuple[str, ...]
    languages: tuple[str, ...]
    values: Table


@dataclass(frozen=True)
class Curves:
    """Lines over the steps: name -> (steps, values)."""

    name: str
    title: str
    lines: dict[str, tuple[list[float], list[float]]]
    level: float | None = None
    """A dashed line for comparison."""


def heat_maps(rebuilt: Rebuilt) -> Iterator[HeatMap]:
    """Probability and value by topic, then by region; values only where the policy has some."""
    topics, regions = rebuilt.router.topics, rebuilt.router.regions
    of_topics = [[((topic,), ())] for topic in topics]
    of_regions = [[((topic,), (region,)) for topic in topics or ("",)] for region in regions]
    for name, title, rows, contexts in (
        ("topics", "topic", topics, of_topics),
        ("regions", "region, mean over topics", regions, of_regions),
    ):
        if not rows:
            continue
        for kind, of in (("probability", probabilities), ("value", values)):
            table = np.array([of(rebuilt, row) for row in contexts])
            if np.isfinite(table).any():
                yield HeatMap(
                    f"{name}_{kind}", f"{kind.capitalize()} by {title}", rows, rebuilt.router.languages, table
                )


TopicsAndRegions = tuple[tuple[str, ...], tuple[str, ...]]


def probabilities(rebuilt: Rebuilt, contexts: Sequence[TopicsAndRegions]) -> Table:
    """float64 [L]: mean over contexts and question languages; NaN where a topic leaves no choice."""
    router = rebuilt.router
    rows = [
        router.distribution(Prompt(f"{language}/{topics}/{regions}", "", "", language, language, topics, regions))
        for topics, regions in contexts
        if rebuilt.fixed_topics.isdisjoint(topics)
        for language in _question_languages(router)
    ]
    return np.mean(rows, axis=0) if rows else np.full(len(router.languages), np.nan)


def values(rebuilt: Rebuilt, contexts: Sequence[TopicsAndRegions]) -> Table:
    """float64 [L]: mean over the contexts and question languages that have a value; NaN where none has."""
    router = rebuilt.router
    own = _question_languages(router) if router.policy.per_language else ("",)
    table = router.policy.values([Context(*context, language) for context in contexts for language in own])
    known = np.isfinite(table)
    total, count = np.where(known, table, 0.0).sum(axis=0), known.sum(axis=0)
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


def _question_languages(router: BanditRouter) -> tuple[str, ...]:
    every = math.ceil(len(router.languages) / QUESTION_LANGUAGES)
    return router.languages[::every] if router.policy.per_language else router.languages[:1]


# --- curves -------------------------------------------------------------------------------------------------------


def curves(log: Sequence[Record]) -> Iterator[Curves]:
    """What the log says of the router over the steps."""
    entropy = _series(log, "router/entropy")
    languages = logged_languages(log)
    uniform = 1.0 / max(1, len(languages))
    if entropy[0]:
        yield Curves("entropy", "Entropy of drawn slots (nats)", {"entropy": entropy}, math.log(max(1, len(languages))))
    for name, title, level, of in (
        ("probability", "Probability of a drawn slot", uniform, lambda one: _series(log, f"router/probability/{one}")),
        ("share", "Share of all rollouts", uniform, lambda one: _shares(log, one)),
        ("value", "Value, mean over topics", None, lambda one: _values(log, one)),
        ("reward", "Mean reward", None, lambda one: _series(log, f"reward/{one}")),
    ):
        lines = {language: of(language) for language in languages}
        lines = {language: line for language, line in lines.items() if line[0]}
        if lines:
            yield Curves(name, title, lines, level)


def logged_languages(log: Sequence[Record]) -> tuple[str, ...]:
    """All languages that the log names, sorted."""
    keys = {key for record in log for key in record}
    return tuple(sorted({key.rpartition("/")[2] for key in keys if key.startswith(("router/probability/", "count/"))}))


def _series(log: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    points = [(record["step"], record[key]) for record in log if isinstance(record.get(key), (int, float))]
    return [step for step, _ in points], [value for _, value in points]


def _shares(log: Sequence[Record], language: str) -> tuple[list[float], list[float]]:
    counted = [record for record in log if record.get("count")]
    return [r["step"] for r in counted], [r.get(f"count/{language}", 0.0) / r["count"] for r in counted]


def _values(log: Sequence[Record], language: str) -> tuple[list[float], list[float]]:
    points = []
    for record in log:
        found = [v for k, v in record.items() if k.startswith("router/value/") and k.endswith(f"/{language}")]
        found = [value for value in found if isinstance(value, (int, float))]
        if found:
            points.append((record["step"], float(np.mean(found))))
    return [step for step, _ in points], [value for _, value in points]


# --- pictures -----------------------------------------------------------------------------------------------------


def furthest(values: Table, most: int) -> NDArray[np.int64]:
    """The rows to show, in their order: those that differ most from the mean row."""
    if len(values) <= most:
        return np.arange(len(values))
    distance = np.abs(values - np.nanmean(values, axis=0)).sum(axis=1)
    return np.sort(np.argsort(-np.nan_to_num(distance, nan=-1.0), kind="stable")[:most])


def draw_heat_map(heat_map: HeatMap) -> bytes:
    """As PNG."""
    rows = furthest(heat_map.values, SHOWN_ROWS)
    shown = heat_map.values[rows]
    width = min(3.5 + 0.34 * len(heat_map.languages), 60.0)
    figure, axes = plt.subplots(figsize=(width, 1.2 + 0.28 * len(rows)))
    # Values with a sign are centred on 0, others keep their own range; probabilities begin at 0.
    signed = bool((shown < 0.0).any())
    limit = float(np.nanmax(np.abs(shown))) or 1.0
    least = -limit if signed else float(np.nanmin(shown)) if heat_map.name.endswith("value") else 0.0
    colours = plt.get_cmap("RdBu_r" if signed else "viridis").with_extremes(bad="#cccccc")
    image = axes.imshow(np.ma.masked_invalid(shown), cmap=colours, vmin=least, vmax=limit, aspect="auto")
    every = _every_name(heat_map)
    axes.set_xticks(range(0, len(heat_map.languages), every), heat_map.languages[::every], fontsize=8, rotation=90)
    axes.set_yticks(range(len(rows)), [heat_map.rows[row] for row in rows], fontsize=8)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01)
    return _png(figure)


def _every_name(heat_map: HeatMap) -> int:
    """1: all languages are named; n: every n-th."""
    return math.ceil(len(heat_map.languages) / SHOWN_NAMES)


def draw_curves(plot: Curves) -> bytes:
    """As PNG; the names stand at the right, by last value."""
    figure, axes = plt.subplots(figsize=(9, 4))
    chosen = sorted(plot.lines, key=lambda name: -plot.lines[name][1][-1])[:SHOWN_CURVES]
    colours = plt.get_cmap("tab20").colors
    for i, name in enumerate(chosen):
        steps, heights = plot.lines[name]
        axes.plot(steps, heights, label=name, color=colours[i % len(colours)], marker="." if len(steps) < 3 else None)
    if plot.level is not None:
        axes.axhline(plot.level, color="black", linewidth=0.8, linestyle="--", label="uniform")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def _png(figure: plt.Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90, bbox_inches="tight")
    plt.close(figure)
    return file.getvalue()


# --- the page -----------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.45 sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; }
img { max-width: 100%; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 1px 8px; text-align: right; border-bottom: 1px solid #ddd; } th:first-child { text-align: left; }
.wide { overflow-x: auto; } figure { margin: 1.5em 0; } figcaption { font-weight: bold; } .note { color: #666; }
"""


def page(source: Source, settings: str, pictures: Sequence[tuple[HeatMap | Curves, bytes]]) -> str:
    """The report, pictures inside."""
    body = [f"<h1>Router: {html.escape(source.path.name)}</h1>", "<ul>"]
    body += [f"<li>{html.escape(line)}</li>" for line in _facts(source, settings)]
    body += ["</ul>", "<h2>Languages</h2>", _language_table(source, [one for one, _ in pictures])]
    for heading, kind in (("What it has learned", HeatMap), ("How it got there", Curves)):
        chosen = [(one, png) for one, png in pictures if isinstance(one, kind)]
        body += [f"<h2>{heading}</h2>"] if chosen else []
        for one, png in chosen:
            body.append(_figure(one.title, _note(one), png))
            if isinstance(one, HeatMap):
                body.append(_numbers(one))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Router: '
        f"{html.escape(source.path.name)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _facts(source: Source, settings: str) -> Iterator[str]:
    state, log = source.state, source.log
    if state is not None:
        languages, topics, regions = (len(state.get(axis) or []) for axis in ("languages", "topics", "regions"))
        yield f"Policy {state['policy']} after {state['step']} steps; {settings}."
        yield f"{languages} languages, {topics} topics, {regions} regions."
    else:
        yield "No router's state: neither a checkpoint nor a model; curves only."
    if log:
        yield f"Log of steps {log[0]['step']:g} to {log[-1]['step']:g}, {len(log)} in all."
        entropies = _series(log, "router/entropy")[1]
        if entropies:
            uniform = math.log(max(1, len(logged_languages(log))))
            yield f"Entropy of drawn slots: {entropies[0]:.3f} at first, {entropies[-1]:.3f} at last, of {uniform:.3f}."
    else:
        yield f"No log ({LOG}): no curves."


def _language_table(source: Source, plots: Sequence[HeatMap | Curves]) -> str:
    """A row per language: means over the heat maps' rows and over the last steps of the curves."""
    columns: dict[str, dict[str, float]] = {}
    for plot in plots:
        if isinstance(plot, HeatMap):
            known = plot.values[np.isfinite(plot.values).any(axis=1)]
            columns[plot.title] = dict(zip(plot.languages, np.nanmean(known, axis=0).tolist()))
        elif plot.name != "entropy":
            last = f"{plot.title}, last {LAST_STEPS} steps"
            columns[last] = {name: float(np.mean(line[1][-LAST_STEPS:])) for name, line in plot.lines.items()}
    languages = list((source.state or {}).get("languages") or logged_languages(source.log))
    return _html_table(
        ["language", *columns], [[x, *(column.get(x) for column in columns.values())] for x in languages]
    )


def _numbers(heat_map: HeatMap) -> str:
    rows = furthest(heat_map.values, SHOWN_ROWS)
    cells = [[heat_map.rows[row], *heat_map.values[row].tolist()] for row in rows]
    table = _html_table(["", *heat_map.languages], cells)
    return f"<details><summary>numbers</summary>{table}</details>"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    for name, *cells in rows:
        numbers = ("" if x is None or math.isnan(x) else f"{x:.4f}" for x in cells)
        lines.append(f"<th>{html.escape(str(name))}</th>" + "".join(f"<td>{number}</td>" for number in numbers))
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _note(plot: HeatMap | Curves) -> str:
    if isinstance(plot, HeatMap):
        left = len(plot.rows) - SHOWN_ROWS
        note = f"The {SHOWN_ROWS} of {len(plot.rows)} rows that differ most from their mean." if left > 0 else ""
        every = _every_name(plot)
        note += f" One language in {every} is named; all are in the numbers." if every > 1 else ""
        return note + (" Grey: no choice, or no value." if np.isnan(plot.values).any() else "")
    left = len(plot.lines) - SHOWN_CURVES
    return f"The {SHOWN_CURVES} of {len(plot.lines)} languages with the largest last values." if left > 0 else ""


def _figure(title: str, note: str, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption><p class=note>{html.escape(note)}</p>"
        f'<div class="wide"><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></div></figure>'
    )


def write(
    source: Source, out: Path, router_name: str | None = None, overrides: Sequence[str] = (), base: str | None = None
) -> Path:
    """Write the pictures and the page into `out`; returns the path of the page."""
    plots: list[HeatMap | Curves] = []
    settings = ""
    if source.state is not None:
        rebuilt = rebuild(source, router_name, overrides, base)
        plots += heat_maps(rebuilt)
        settings = f"settings: {rebuilt.settings}"
    plots += curves(source.log)
    pictures = [(plot, draw_heat_map(plot) if isinstance(plot, HeatMap) else draw_curves(plot)) for plot in plots]
    out.mkdir(parents=True, exist_ok=True)
    for plot, png in pictures:
        (out / f"{plot.name}.png").write_bytes(png)
    path = out / "router.html"
    path.write_text(page(source, settings, pictures), encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="run directory, checkpoint, .nemo, .json or .jsonl")
    parser.add_argument("overrides", nargs="*", metavar="router.KEY=VALUE", help="settings that differ from the file")
    parser.add_argument("--out", type=Path, help="directory of the pictures and router.html (default: SOURCE/router)")
    parser.add_argument("--config", choices=("train", "demo"), help="file of conf, if not the run's own config.yaml")
    parser.add_argument("--router", metavar="NAME", help="file of conf/router, if not the run's own config.yaml")
    options = parser.parse_args(arguments)
    if options.out is None and not options.source.is_dir():
        parser.error("--out: say where to write; only a directory has a default, SOURCE/router")
    out = options.out or options.source / "router"
    try:
        path = write(read_source(options.source), out, options.router, options.overrides, options.config)
    except SavedRouterError as error:
        sys.exit(f"SavedRouterError: {error}")
    print(path)


if __name__ == "__main__":
    main()
