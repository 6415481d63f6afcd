"""Draws belong to (sample seed, position): right distribution, no dependence on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_lrpo.actor.sampling import filter_logits, sample_tokens, uniforms
from nemo_lrpo.seeding import derive_seed

SEEDS = [derive_seed("test", index) for index in range(20_000)]


def test_uniforms_are_uniform_over_seeds_and_over_positions() -> None:
    over_seeds = uniforms(SEEDS, 3)
    over_positions = np.array([uniforms(SEEDS[:1], position)[0] for position in range(5_000)])
    for values in (over_seeds, over_positions):
        assert values.min() >= 0.0 and values.max() < 1.0
        counts = np.histogram(values, bins=10, range=(0, 1))[0]
        expected = len(values) / 10
        # Chi-square with 9 degrees of freedom: 27.9 is its 99.9th percentile.
        assert ((counts - expected) ** 2 / expected).sum() < 27.9
    assert abs(np.corrcoef(uniforms(SEEDS, 3), uniforms(SEEDS, 4))[0, 1]) < 0.03


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_a_draw_does_not_depend_on_the_others(seeds: list[int], position: int) -> None:
    together = uniforms(seeds, position)
    assert together.tolist() == [uniforms([seed], position)[0] for seed in seeds]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 2, 1.0), (1.0, 0, 0.7)]
)
def test_frequencies_are_those_of_the_softmax(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.tensor([0.3, 1.2, -0.5, 0.9, -torch.inf])
    kept = filter_logits(logits[None] / temperature, top_k, top_p)[0]
    expected = kept.softmax(-1)
    drawn = sample_tokens(
        logits.expand(len(SEEDS), -1), torch.from_numpy(uniforms(SEEDS, 0)), temperature, top_k, top_p
    )
    found = torch.bincount(drawn, minlength=5) / len(SEEDS)
    assert torch.all(found[expected == 0] == 0)
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)


def test_the_nucleus_keeps_the_first_token_and_what_reaches_the_mass() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert torch.isfinite(filter_logits(logits, 0, 0.5)).tolist() == [[True, False, False, False]]
    assert torch.isfinite(filter_logits(logits, 0, 0.79)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(filter_logits(logits, 0, 0.01)).tolist() == [[True, False, False, False]]


def test_temperature_zero_is_the_argmax() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    drawn = sample_tokens(logits, torch.rand(50, dtype=torch.float64), 0.0)
    assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_land_on_tokens_with_probability(uniform: float) -> None:
    logits = torch.full((1, 100_000), -torch.inf)
    logits[0, 7], logits[0, 99_998] = 0.0, 0.0
    drawn = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), 1.0)
    assert drawn.item() == (7 if uniform == 0.0 else 99_998)


def test_derived_seeds_tell_parts_apart() -> None:
    seeds = {
        derive_seed("ab", "c"),
        derive_seed("a", "bc"),
        derive_seed("abc"),
        derive_seed("ab", 1),
        derive_seed("ab", "1"),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**64 for seed in seeds)
