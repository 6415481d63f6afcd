"""Charts as inline SVG in the page's own colours: no script, no font, light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values [N]; NaN where there is no value."""
COLOURS = 6
"""Of runs, --s0 to --s5 in the page; of more runs colours come again with other dashes."""
POINTS = 240
"""Of a line; longer ones are averaged in so many pieces."""

_LAYERS = ("raw", "seen", "unseen", "trend", "macro", "dots")
"""Kinds of lines, the last on top."""


@dataclass(frozen=True)
class Size:
    """In units of the drawing: about a pixel each."""

    width: float
    height: float
    left: float
    bottom: float


LARGE, SMALL = Size(350, 190, 44, 30), Size(190, 104, 34, 18)


@dataclass(frozen=True)
class Line:
    """values of a run (its number) over the steps. kind: trend (a running mean), raw, or, with a dot at each of some
    steps only, dots (thin), macro (thick), seen (dashed), unseen (dotted)."""

    run: int
    kind: str
    series: Series


def trend(series: Series) -> tuple[Series, int]:
    """The running mean over the last values, and over how many; a 40th of the run, 5 at least."""
    steps, values = series
    window = max(5, math.ceil(len(values) / 40))
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(known, values, 0.0), known.astype(float)))
    start = np.maximum(np.arange(len(values)) + 1 - window, 0)
    end = np.arange(len(values)) + 1
    count = counts[end] - counts[start]
    mean = np.divide(sums[end] - sums[start], count, out=np.full(len(values), np.nan), where=count > 0)
    return (steps, mean), window


def limits(lines: Sequence[Line], level: float | None = None) -> tuple[float, float] | None:
    """The range of all values, with room; None where there are none."""
    found = [line.series[1][np.isfinite(line.series[1])] for line in lines]
    values = np.concatenate([*found, [] if level is None else [level]]) if found else np.array([])
    if not sum(map(len, found)):
        return None
    low, high = float(values.min()), float(values.max())
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    # A rate or a count has nothing below 0.
    return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def line_chart(
    title: str,
    lines: Sequence[Line],
    size: Size = LARGE,
    level: float | None = None,
    y_range: tuple[float, float] | None = None,
) -> Markup:
    """An SVG of lines over the steps, or a sentence where there is nothing to draw. level: a dashed line to compare
    with. y_range: where charts stand beside each other."""
    y_range = y_range or limits(lines, level)
    steps = [line.series[0] for line in lines if len(line.series[0])]
    if y_range is None or not steps or limits(lines) is None:
        return Markup('<p class="none">not logged</p>')
    first, last = min(float(s.min()) for s in steps), max(float(s.max()) for s in steps)
    first, last = (first, last) if last > first else (first - 0.5, last + 0.5)
    right, top, base = size.width - 8, 8.0, size.height - size.bottom

    def x(step: float) -> float:
        return size.left + (step - first) / (last - first) * (right - size.left)

    def y(value: float) -> float:
        return base - (value - y_range[0]) / (y_range[1] - y_range[0]) * (base - top)

    parts = [_open(size.width, size.height, title)]
    for tick in ticks(*y_range, 4 if size is LARGE else 3):
        parts.append(_grid(size.left, y(tick), right, y(tick)))
        parts.append(_text(size.left - 5, y(tick) + 3.5, f"{tick:.4g}", "end"))
    for tick in ticks(first, last, 5 if size is LARGE else 2, whole=True):
        parts.append(_text(x(tick), base + 13, f"{tick:.6g}", "middle"))
    if size is LARGE:
        parts.append(_text((size.left + right) / 2, size.height - 3, "step", "middle"))
    if level is not None:
        parts.append(Markup('<path class="level" d="M{:.1f} {:.1f}H{:.1f}"/>').format(size.left, y(level), right))
    # Trends on top of what they are the mean of.
    for line in sorted(lines, key=lambda one: _LAYERS.index(one.kind)):
        points = [(x(s), None if math.isnan(v) else y(v)) for s, v in zip(*_thinned(line.series))]
        parts.append(_path(points, line))
    return Markup("").join([*parts, Markup("</svg>")])


def forest(title: str, rows: Sequence[tuple[str, Sequence[tuple[float, float, float] | None]]]) -> Markup:
    """A row per name; in it a dot with an interval (value, low, high) per run; a line at 0."""
    shown = [one for _, runs in rows for one in runs if one is not None]
    low, high = min(0.0, *(one[1] for one in shown)), max(0.0, *(one[2] for one in shown))
    room = 0.05 * (high - low) or 1.0
    low, high = low - room, high + room
    width, left, right = 440.0, 122.0, 432.0
    pitch = 9.0 * max(len(runs) for _, runs in rows) + 11.0
    height = pitch * len(rows) + 24.0

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    parts = [_open(width, height, title)]
    for tick in ticks(low, high, 5):
        parts.append(_grid(x(tick), 2, x(tick), height - 20))
        parts.append(_text(x(tick), height - 7, f"{tick:+.3g}" if tick else "0", "middle"))
    parts.append(Markup('<path class="level" d="M{:.1f} 2V{:.1f}"/>').format(x(0.0), height - 20))
    for number, (name, runs) in enumerate(rows):
        middle = pitch * (number + 0.5)
        parts.append(_text(left - 8, middle + 4, name, "end"))
        for run, one in enumerate(runs):
            if one is not None:
                at = middle + 9.0 * (run - (len(runs) - 1) / 2)
                parts.append(
                    Markup('<path class="whisker s{}" d="M{:.1f} {:.1f}H{:.1f}"/>').format(
                        run % COLOURS, x(one[1]), at, x(one[2])
                    )
                )
                parts.append(_dot(run, x(one[0]), at))
    return Markup("").join([*parts, Markup("</svg>")])


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers between low and high, about `most` of them. whole: integers only."""
    rough = (high - low) / most
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= rough * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    found = [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [0.0 if abs(tick) < step * 1e-9 else tick for tick in found]


def _thinned(series: Series) -> Series:
    steps, values = series
    if len(steps) <= POINTS:
        return series
    pieces = zip(np.array_split(steps, POINTS), np.array_split(values, POINTS))
    means = [(s.mean(), np.nanmean(v) if np.isfinite(v).any() else np.nan) for s, v in pieces]
    return np.array([s for s, _ in means]), np.array([v for _, v in means])


def _path(points: Sequence[tuple[float, float | None]], line: Line) -> Markup:
    """Broken where a value is missing; a value between two gaps is a dot."""
    drawn, dots, pen = [], [], False
    for i, (x, y) in enumerate(points):
        if y is None:
            pen = False
            continue
        drawn.append(f"{'L' if pen else 'M'}{x:.1f} {y:.1f}")
        alone = not pen and (i + 1 == len(points) or points[i + 1][1] is None)
        if line.kind not in ("raw", "trend") or (alone and line.kind == "trend"):
            dots.append(_dot(line.run, x, y))
        pen = True
    again = " again" if line.run >= COLOURS else ""
    path = Markup('<path class="{} s{}{}" d="{}"/>').format(line.kind, line.run % COLOURS, again, " ".join(drawn))
    return Markup("").join([path, *dots])


def _dot(run: int, x: float, y: float) -> Markup:
    return Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(run % COLOURS, x, y)


def _open(width: float, height: float, title: str) -> Markup:
    return Markup('<svg viewBox="0 0 {:g} {:.4g}" role="img" aria-label="{}">').format(width, height, title)


def _grid(x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="grid" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)
