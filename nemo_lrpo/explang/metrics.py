"""What the policy chose and how it fared, in all and by chosen language, seen and unseen languages apart, and where the
router proposes some of the thinking languages those that were forced apart from those that were chosen."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from statistics import fmean

from nemo_lrpo.explang.format import Defect
from nemo_lrpo.explang.rewards import Outcome

COMPLIANT_FROM = 0.5
"""r_c from which on a response counts as compliant; with a gate of 0 or 1 the threshold makes no difference."""


def outcome_metrics(
    outcomes: Sequence[Outcome], seen: Collection[str], correct_from: float, stage: str | None = None
) -> dict[str, float]:
    """Over all responses, and with the endings `/<language>`, `/seen`, `/unseen` over those in such a chosen or forced
    thinking language, and where there are both `/chosen` and `/forced` over those whose language the policy chose, or
    failed to choose, and those whose tag was prefilled:

    count                   responses
    well_formed, compliance, tokens
                            means; compliance over the responses that the gate does not mask
    accuracy                share correct
    accuracy_compliant      the same over compliant responses alone
    accuracy_strict         the same over all, a response that is not compliant counted as wrong
    pass_at_k               share of groups with a correct response

    Responses without a verdict enter none of the last four and are counted as `unverified`. A mean over nothing has no
    entry. Over all responses only:

    forced                  share whose language was forced; they enter none of what follows but the defects
    selected/<language>     share that chose it, also as selected_<stage>/<language> where `stage` is given;
                            selected/seen, /unseen, /none likewise
    languages_effective     exp of the entropy of the chosen languages: n where n are chosen equally often, 1 where one
                            is; by it selection spreads or concentrates
    defect/<name>           share with this defect
    """
    values: dict[str, float] = {}
    free = [outcome for outcome in outcomes if not outcome.forced]
    chosen = Counter(outcome.language for outcome in free if outcome.language is not None)
    spoken = dict.fromkeys(outcome.language for outcome in outcomes if outcome.language is not None)
    scopes: dict[str, Callable[[Outcome], bool]] = {
        "": lambda _: True,
        "/seen": lambda o: o.language is not None and o.language in seen,
        "/unseen": lambda o: o.language is not None and o.language not in seen,
    }
    if 0 < len(free) < len(outcomes):
        scopes |= {"/chosen": lambda o: not o.forced, "/forced": lambda o: o.forced}
    scopes |= {f"/{language}": lambda o, language=language: o.language == language for language in spoken}
    for suffix, belongs in scopes.items():
        part = [outcome for outcome in outcomes if belongs(outcome)]
        values |= {name + suffix: value for name, value in _facts(part, correct_from).items()}
    if not outcomes:
        return values
    values["forced"] = 1.0 - len(free) / len(outcomes)
    shares = {language: count / len(free) for language, count in chosen.items()}
    if free:
        shares["seen"] = sum(share for language, share in shares.items() if language in seen)
        shares["unseen"] = chosen.total() / len(free) - shares["seen"]
        shares["none"] = 1.0 - chosen.total() / len(free)
    for prefix in ("selected", f"selected_{stage}") if stage else ("selected",):
        values |= {f"{prefix}/{name}": share for name, share in shares.items()}
    defects = Counter(outcome.defect for outcome in outcomes)
    values |= {f"defect/{defect.value}": defects[defect] / len(outcomes) for defect in Defect}
    if chosen:
        probabilities = [count / chosen.total() for count in chosen.values()]
        values["languages_effective"] = math.exp(-sum(p * math.log(p) for p in probabilities))
    return dict(sorted(values.items()))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the probability that k of n samples, drawn without replacement, hold one of the c
    correct ones. Raises ValueError unless 1 <= k <= n and 0 <= c <= n."""
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise ValueError(f"pass@{k} of {samples} samples, {correct} of them correct, is not defined.")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def _facts(outcomes: Sequence[Outcome], correct_from: float) -> dict[str, float]:
    groups: dict[str, list[bool]] = defaultdict(list)
    correct, strict, compliant_only = [], [], []
    for outcome in outcomes:
        if outcome.verified is None:
            continue
        right = outcome.is_correct(correct_from)
        compliant = outcome.compliance is not None and outcome.compliance >= COMPLIANT_FROM
        groups[outcome.group_id].append(right)
        correct.append(right)
        strict.append(right and compliant)
        if compliant:
            compliant_only.append(right)
    columns: dict[str, list[float] | list[bool] | list[int]] = {
        "well_formed": [outcome.defect is None for outcome in outcomes],
        "compliance": [outcome.compliance for outcome in outcomes if outcome.compliance is not None],
        "tokens": [outcome.tokens for outcome in outcomes],
        "accuracy": correct,
        "accuracy_compliant": compliant_only,
        "accuracy_strict": strict,
        "pass_at_k": [any(rights) for rights in groups.values()],
    }
    facts = {name: fmean(column) for name, column in columns.items() if column}
    return {"count": float(len(outcomes)), "unverified": float(len(outcomes) - len(correct)), **facts}
