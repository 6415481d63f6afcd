"""What was parsed of a response, as flags of its score: texts are on one rank only, scores on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nemo_lrpo.explang.format import Defect, Parsed
from nemo_lrpo.explang.rewards import Outcome
from nemo_lrpo.types import RoutedPrompt, Score

SELECTED = "selected:"
"""Before the code of the chosen language."""
DEFECT = "defect:"
"""Before the name of the defect."""


def flags_of(parsed: Parsed) -> tuple[str, ...]:
    """`selected:<code>` where a language was chosen, `defect:<name>` where the output is not whole; one at least."""
    selected = () if parsed.language is None else (SELECTED + parsed.language,)
    return selected if parsed.defect is None else (*selected, DEFECT + parsed.defect.value)


def is_own(flag: str) -> bool:
    """Whether `flag` is one of these."""
    return flag.startswith((SELECTED, DEFECT))


def outcomes_of(
    rows: Sequence[RoutedPrompt], scores: Mapping[str, Score], tokens: Sequence[int | None]
) -> list[Outcome]:
    """The outcomes of the rows whose output was parsed, in order; a row without a score, or whose output was not sent,
    is left out. tokens: of each row's response."""
    outcomes = []
    for routed, length in zip(rows, tokens, strict=True):
        score = scores.get(routed.sample_id)
        if score is None or not any(map(is_own, score.flags)):
            continue
        names = {flag.partition(":")[0] + ":": flag.partition(":")[2] for flag in score.flags if is_own(flag)}
        outcomes.append(
            Outcome(
                sample_id=routed.sample_id,
                group_id=routed.group_id,
                language=names.get(SELECTED),
                defect=Defect(names[DEFECT]) if DEFECT in names else None,
                compliance=score.gate,
                verified=score.quality,
                tokens=length or 0,
                forced=routed.thinking is not None,
            )
        )
    return outcomes
