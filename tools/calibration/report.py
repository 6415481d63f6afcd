"""What a calibration does, as Markdown and a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.rewards.statistics import KINDS, Moments, Pair, PairStatistics, weighted_mean

from .parity import Fairness


@dataclass(frozen=True)
class Report:
    """statistics: as written. found: by method, `none` among them. facts: compared in `found`. held_out: whether the
    statistics have not seen these."""

    statistics: PairStatistics
    found: Mapping[str, Fairness]
    facts: int
    held_out: bool


def write_report(out: Path, report: Report) -> list[Path]:
    """Write `out`.report.md and, beside it, `out`.report.png; returns both."""
    picture, text = (out.with_name(f"{out.name}.report.{suffix}") for suffix in ("png", "md"))
    _draw(picture, report)
    text.write_text(_markdown(report, picture.name), encoding="utf-8")
    return [text, picture]


def summary(report: Report) -> str:
    """Mean cosines by language, then a line per method."""
    found = report.found
    lines = [*_columns(_language_rows(report.statistics)), ""]
    lines.append(f"{report.facts} facts {_which(report)}:")
    lines += _columns([["", "spread / std", "of all answers", "AUC mismatch", "AUC hardest"], *_method_rows(found)])
    pairs = report.statistics.equivalent
    lines.append(f"{len(pairs)} pairs, mu_ref {weighted_mean(pairs.values()):.4f}")
    return "\n".join(lines)


def _which(report: Report) -> str:
    return "that the statistics have not seen" if report.held_out else "of the statistics themselves, none held out"


def _markdown(report: Report, picture: str) -> str:
    found = report.found
    languages = sorted(found["none"].means)
    methods = list(found)
    source = report.statistics.source
    none = found["none"]
    parts = [
        "# Calibration",
        f"Encoder `{report.statistics.encoder}`.",
        _table([["", "setting"], *([key, str(value)] for key, value in source.items() if key != "identical")]),
        "## The statistics",
        _table(_language_rows(report.statistics)),
        "Mean cosines of equivalent texts (in one language; across languages), of mismatches and of hardest negatives "
        "(across languages), and how many equivalents across languages were compared."
        + (
            f" One wording per fact, compared with itself: {', '.join(source['identical'])}."
            if source.get("identical")
            else ""
        ),
        "## Is the reward the same for the same answer?",
        f"Measured on {report.facts} facts {_which(report)}, every one a reference in each language and an answer in "
        "each. Means of r_qual of equivalent answers, by the language of the answer:",
        _table([["", *methods], *([code, *(f"{found[m].means[code]:.4f}" for m in methods)] for code in languages)]),
        _table(
            [
                ["", "largest difference", "/ std of equivalents", "/ std of all answers", "order changed in pairs"],
                *(
                    [m, f"{f.spread:.4f}", f"{f.parity:.3f}", f"{f.parity_all:.3f}", str(f.reordered)]
                    for m, f in found.items()
                ),
            ]
        ),
        "All answers: equivalents, mismatches and hardest negatives in equal parts. The order that may not change is "
        "that of answers in one language to one reference.",
        f"![deviation of each pair]({picture})",
        "Mean of equivalents of a pair minus the mean over all pairs, in standard deviations of equivalents.",
        "## Does it tell right from wrong?",
        "Area under the ROC curve of r_qual, over all references, by the language of the answer:",
    ]
    for kind in KINDS[1:]:
        if none.auc[kind]:
            rows = [[code, *(f"{found[m].auc[kind][code]:.4f}" for m in methods)] for code in sorted(none.auc[kind])]
            means = ["mean", *(f"{np.mean(list(found[m].auc[kind].values())):.4f}" for m in methods)]
            parts += [f"Equivalent against {kind}:", _table([["", *methods], *rows, means])]
    parts.append("## Mean of equivalents by reference (row) and answer (column)")
    for method, name in (("none", "cosine"), ("mean", "after calibration to the mean")):
        rows = [
            [a, *(f"{found[method].pairs[a, b]:.3f}" if (a, b) in found[method].pairs else "" for b in languages)]
            for a in languages
        ]
        parts += [f"{name[0].upper()}{name[1:]}:", _table([["", *languages], *rows])]
    return "\n\n".join(parts) + "\n"


def _language_rows(statistics: PairStatistics) -> list[list[str]]:
    def mean(samples: Mapping[Pair, Moments], keep: Callable[[Pair], bool]) -> str:
        known = [m for pair, m in samples.items() if keep(pair)]
        return f"{weighted_mean(known):.3f}" if known else "-"

    rows = [["language", "own", "others", "mismatch", "hardest", "samples"]]
    for language in sorted({language for pair in statistics.equivalent for language in pair}):

        def own(pair: Pair, language: str = language) -> bool:
            return pair == (language, language)

        def other(pair: Pair, language: str = language) -> bool:
            return language in pair and pair[0] != pair[1]

        samples = sum(m.count for pair, m in statistics.equivalent.items() if other(pair))
        kinds = [statistics.equivalent, statistics.mismatch, statistics.hardest]
        rows.append([language, mean(statistics.equivalent, own), *(mean(kind, other) for kind in kinds), str(samples)])
    return rows


def _method_rows(found: Mapping[str, Fairness]) -> list[list[str]]:
    def auc(fair: Fairness, kind: str) -> str:
        return f"{np.mean(list(fair.auc[kind].values())):.4f}" if fair.auc[kind] else "-"

    return [
        [method, f"{fair.parity:.3f}", f"{fair.parity_all:.3f}", *(auc(fair, kind) for kind in KINDS[1:])]
        for method, fair in found.items()
    ]


def _columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _draw(path: Path, report: Report) -> None:
    """A heat map per method, all on one scale."""
    # Not pyplot: it would choose a display and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    languages = sorted(report.found["none"].means)
    figure = Figure(figsize=(4.2 * len(report.found), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(report.found), squeeze=False)[0]
    for axis, (method, fair) in zip(axes, report.found.items()):
        image = axis.imshow(_deviations(fair, languages), cmap="RdBu_r", vmin=-2.0, vmax=2.0)
        axis.set_title(f"{method}: spread / std = {fair.parity:.2f}", fontsize=10)
        axis.set_xticks(range(len(languages)), languages, fontsize=7)
        axis.set_yticks(range(len(languages)), languages, fontsize=7)
        axis.set_xlabel("language of the answer", fontsize=8)
    axes[0].set_ylabel("language of the reference", fontsize=8)
    figure.colorbar(image, ax=list(axes), label="standard deviations from the mean of all pairs", shrink=0.8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _deviations(fair: Fairness, languages: Sequence[str]) -> NDArray[np.float64]:
    """[languages, languages], NaN for a pair without comparisons."""
    values = np.array([[fair.pairs.get((a, b), np.nan) for b in languages] for a in languages])
    return (values - np.nanmean(values)) / fair.value_std
