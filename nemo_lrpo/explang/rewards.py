"""The reward of each response, r = lambda_f r_f + lambda_c r_c + lambda_d r_d + lambda_p r_p + lambda_v r_v.

    r_f  1 where the output is whole (explang/format.py), else 0
    r_c  whether the thinking block is in the chosen language, as the language gate says
    r_d  k_min / k: k responses of the group chose this language, k_min the language that the fewest chose
    r_p  1 where a response of the group that chose the same language, itself included, is correct, else 0
    r_v  what the verifier says of the answer

Each is in [0, 1]. A response that chose no language has r_c = r_d = r_p = 0. Responses are told by their sample ids and
groups by their group ids; their order does not matter.

A forced response, whose tag was prefilled, has chosen nothing. r_f, r_c and r_v judge what follows the tag, as ever.
r_d and r_p judge the choice: it is counted neither in k nor in k_min, and for both it gets the mean of the group's
responses that chose, so that within a group r_d and r_p tell those apart and nothing else. What it shows counts: a
correct forced response makes r_p = 1 for those that chose its language.

Where the published formula leaves open what is meant: a group is the question's (the released code counts over all
responses of one call); r_p pays the correct response too, as the released code does (the paper says all others of its
language); a response that chose no language is paid neither r_d nor r_p (the released code pays those r_p as a language
of their own); r_d also pays a choice that the thinking block does not keep to (`diversity_needs_compliance` is the
released way). A group in one language has r_d = 1 throughout, no advantage comes of it: exploration starts from what
the policy already chooses at times, so that the cold start has to teach more than one language.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nemo_lrpo.config.explang import ExplangConfig, StageConfig
from nemo_lrpo.explang.format import Defect, Parsed


@dataclass(frozen=True)
class Outcome:
    """One response by itself.

    language: the chosen one, None without any. defect: of its format, None where it is whole. compliance: r_c, None
    where the gate masks it. verified: r_v, None where the verifier has no result. tokens: of the response. forced: the
    tag was prefilled, `language` is not the response's choice.
    """

    sample_id: str
    group_id: str
    language: str | None
    defect: Defect | None
    compliance: float | None
    verified: float | None
    tokens: int
    forced: bool = False

    def __post_init__(self) -> None:
        for name in ("compliance", "verified"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"sample {self.sample_id!r}: {name}={value} is not in [0, 1].")

    @staticmethod
    def of(
        sample_id: str, group_id: str, parsed: Parsed, compliance: float | None, verified: float | None, tokens: int
    ) -> Outcome:
        """`compliance` counts only with a chosen language and a thinking block, `verified` only in a whole output; else
        they are 0, whatever is given."""
        return Outcome(
            sample_id=sample_id,
            group_id=group_id,
            language=parsed.language,
            defect=parsed.defect,
            compliance=compliance if parsed.thinks else 0.0,
            verified=0.0 if parsed.defect else verified,
            tokens=tokens,
        )

    def is_correct(self, correct_from: float) -> bool:
        """Whether r_v is there and reaches `correct_from`."""
        return self.verified is not None and self.verified >= correct_from


@dataclass(frozen=True)
class Reward:
    """The parts r_f, r_c, r_d, r_p, r_v of one response in [0, 1], and `total`, their weighted sum; None where r_c or
    r_v is: the sample leaves the update."""

    format: float
    compliance: float | None
    diversity: float
    pass_at_k: float
    verification: float | None
    total: float | None


def assemble(outcomes: Sequence[Outcome], config: ExplangConfig, weights: StageConfig) -> dict[str, Reward]:
    """By sample id, the rewards of whole groups; `weights` are those of the stage. Raises ValueError for a sample id
    that comes twice."""
    rare = diversity(outcomes, config.diversity_needs_compliance)
    solved = language_pass_at_k(outcomes, config.correct_from)
    rewards = {}
    for outcome in outcomes:
        r_f, r_c, r_v = float(outcome.defect is None), outcome.compliance, outcome.verified
        r_d, r_p = rare[outcome.sample_id], solved[outcome.sample_id]
        total = None
        if r_c is not None and r_v is not None:
            total = config.format_weight * r_f + config.compliance_weight * r_c + config.verification_weight * r_v
            total += weights.diversity * r_d + weights.pass_at_k * r_p
        rewards[outcome.sample_id] = Reward(r_f, r_c, r_d, r_p, r_v, total)
    return rewards


def diversity(outcomes: Sequence[Outcome], needs_compliance: bool = False) -> dict[str, float]:
    """r_d by sample id; `needs_compliance`: times r_c. A group that chose one language only gets 1 throughout, so that
    r_d teaches nothing there."""
    chosen: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in _each_once(outcomes).values():
        if outcome.language is not None and not outcome.forced:
            chosen[outcome.group_id][outcome.language] += 1
    least = {group: min(counts.values()) for group, counts in chosen.items()}

    def value(o: Outcome) -> float:
        rarity = 0.0 if o.language is None else least[o.group_id] / chosen[o.group_id][o.language]
        return rarity * (o.compliance or 0.0) if needs_compliance else rarity

    return _of_choices(outcomes, value)


def language_pass_at_k(outcomes: Sequence[Outcome], correct_from: float) -> dict[str, float]:
    """r_p by sample id; an answer is correct from r_v = `correct_from` on."""
    solved = {(o.group_id, o.language) for o in _each_once(outcomes).values() if o.is_correct(correct_from)}
    return _of_choices(outcomes, lambda o: float(o.language is not None and (o.group_id, o.language) in solved))


def _of_choices(outcomes: Sequence[Outcome], value: Callable[[Outcome], float]) -> dict[str, float]:
    """`value` by sample id; of a forced response the mean over those of its group that chose, 0 where none did."""
    values = {outcome.sample_id: value(outcome) for outcome in outcomes if not outcome.forced}
    by_group: dict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        if not outcome.forced:
            by_group[outcome.group_id].append(values[outcome.sample_id])
    # fsum: the same in whatever order they come.
    means = {group: math.fsum(own) / len(own) for group, own in by_group.items()}
    return {o.sample_id: means.get(o.group_id, 0.0) if o.forced else values[o.sample_id] for o in outcomes}


def _each_once(outcomes: Sequence[Outcome]) -> Mapping[str, Outcome]:
    found: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.sample_id in found:
            raise ValueError(f"sample {outcome.sample_id!r} comes twice.")
        found[outcome.sample_id] = outcome
    return found
