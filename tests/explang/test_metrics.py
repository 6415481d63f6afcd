"""Metrics of two groups, counted by hand."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from nemo_lrpo.explang.format import Defect
from nemo_lrpo.explang.metrics import outcome_metrics, pass_at_k
from nemo_lrpo.explang.rewards import Outcome

SEEN = ["de", "en"]
OUTCOMES = [
    Outcome("1/a/0", "1/a", "de", None, 1.0, 1.0, 10),
    Outcome("1/a/1", "1/a", "de", None, 0.0, 1.0, 20),
    Outcome("1/a/2", "1/a", "sw", None, 0.0, 0.0, 30),
    Outcome("1/a/3", "1/a", None, Defect.NO_TAG, 0.0, 0.0, 4),
    Outcome("1/b/0", "1/b", "de", None, None, 0.0, 10),
    Outcome("1/b/1", "1/b", "en", None, 1.0, 0.0, 10),
    Outcome("1/b/2", "1/b", "sw", None, 1.0, 1.0, 10),
    Outcome("1/b/3", "1/b", "sw", None, 1.0, None, 10),
]


def entries(suffix: str) -> dict[str, float]:
    names = ("count", "unverified", "well_formed", "compliance", "tokens", "accuracy", "accuracy_compliant")
    metrics = outcome_metrics(OUTCOMES, SEEN, 1.0)
    return {name: metrics[name + suffix] for name in (*names, "accuracy_strict", "pass_at_k")}


def test_all_responses() -> None:
    assert entries("") == pytest.approx(
        {
            "count": 8,
            "unverified": 1,
            "well_formed": 7 / 8,
            "compliance": 4 / 7,
            "tokens": 13,
            "accuracy": 3 / 7,
            "accuracy_compliant": 2 / 3,
            "accuracy_strict": 2 / 7,
            "pass_at_k": 1.0,
        }
    )


def test_seen_and_unseen_apart() -> None:
    seen = {"count": 4, "unverified": 0, "well_formed": 1, "compliance": 2 / 3, "tokens": 12.5, "accuracy": 0.5}
    seen |= {"accuracy_compliant": 0.5, "accuracy_strict": 0.25, "pass_at_k": 0.5}
    unseen = {"count": 3, "unverified": 1, "well_formed": 1, "compliance": 2 / 3, "tokens": 50 / 3, "accuracy": 0.5}
    unseen |= {"accuracy_compliant": 1.0, "accuracy_strict": 0.5, "pass_at_k": 0.5}
    assert entries("/seen") == pytest.approx(seen)
    assert entries("/unseen") == pytest.approx(unseen)
    assert entries("/sw") == pytest.approx(unseen)


def test_selection_by_language_and_stage() -> None:
    metrics = outcome_metrics(OUTCOMES, SEEN, 1.0, stage="exploration")
    shares = {"de": 3 / 8, "en": 1 / 8, "sw": 3 / 8, "seen": 4 / 8, "unseen": 3 / 8, "none": 1 / 8}
    for name, share in shares.items():
        assert metrics[f"selected/{name}"] == metrics[f"selected_exploration/{name}"] == pytest.approx(share)
    assert metrics["defect/no_tag"] == 1 / 8 and metrics["defect/empty"] == 0.0
    assert not [name for name in outcome_metrics(OUTCOMES, SEEN, 1.0) if name.startswith("selected_")]


@pytest.mark.parametrize(("languages", "effective"), [("de en", 2.0), ("de de", 1.0), ("de en ja sw", 4.0)])
def test_effective_number_of_languages(languages: str, effective: float) -> None:
    outcomes = [Outcome(f"1/a/{i}", "1/a", code, None, 1.0, 1.0, 1) for i, code in enumerate(languages.split())]
    assert outcome_metrics(outcomes, SEEN, 1.0)["languages_effective"] == pytest.approx(effective)


def test_what_is_not_there_has_no_mean() -> None:
    assert outcome_metrics([], SEEN, 1.0) == {
        f"{name}{suffix}": 0.0 for name in ("count", "unverified") for suffix in ("", "/seen", "/unseen")
    }
    lost = outcome_metrics([Outcome("1/a/0", "1/a", None, Defect.EMPTY, 0.0, 0.0, 0)], SEEN, 1.0)
    assert "languages_effective" not in lost and "accuracy_compliant" not in lost and lost["selected/none"] == 1.0


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_one() -> None:
    for samples, correct in itertools.product(range(1, 6), range(6)):
        if correct > samples:
            continue
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations([i < correct for i in range(samples)], k))
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("wrong", [(4, 2, 5), (4, 2, 0), (4, 5, 2), (0, 0, 1)])
def test_pass_at_k_of_too_few_is_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(*wrong)


def test_forced_responses_are_no_selection_and_count_in_all_else() -> None:
    made = [dataclasses.replace(outcome, forced=True) for outcome in OUTCOMES[:2]]
    metrics = outcome_metrics([*made, *OUTCOMES[2:]], SEEN, 1.0, stage="exploration")
    assert metrics["forced"] == 2 / 8 and metrics["accuracy"] == 3 / 7 and metrics["accuracy/de"] == 2 / 3
    shares = {"de": 1 / 6, "en": 1 / 6, "sw": 3 / 6, "seen": 2 / 6, "unseen": 3 / 6, "none": 1 / 6}
    for name, share in shares.items():
        assert metrics[f"selected/{name}"] == metrics[f"selected_exploration/{name}"] == pytest.approx(share)
    # Two right ones, one of them compliant; of the six others five have a verdict, and one of these is right.
    forced = {"count": 2, "accuracy": 1.0, "accuracy_strict": 0.5, "compliance": 0.5, "tokens": 15, "pass_at_k": 1.0}
    free = {"count": 6, "accuracy": 1 / 5, "accuracy_strict": 1 / 5, "compliance": 3 / 5, "tokens": 74 / 6}
    free |= {"pass_at_k": 0.5, "unverified": 1, "well_formed": 5 / 6}
    for scope, facts in (("forced", forced), ("chosen", free)):
        assert {name: metrics[f"{name}/{scope}"] for name in facts} == pytest.approx(facts)
    assert not [name for name in outcome_metrics(OUTCOMES, SEEN, 1.0) if name.endswith(("/chosen", "/forced"))]
    all_made = outcome_metrics(made, SEEN, 1.0, stage="exploration")
    assert all_made["forced"] == 1.0 and all_made["compliance/de"] == 0.5
    assert not [name for name in all_made if name.startswith(("selected", "languages_effective"))]
    assert not [name for name in all_made if name.endswith(("/chosen", "/forced"))], "they are as all"
