"""tools/benches/routing.py on a small step: both sides do the same work, and ours is the faster one."""

from __future__ import annotations

import pytest

from tools.benches.routing import World, build_tokenizer, growth_row, step_row, table


@pytest.mark.parametrize("router", ["published", "default"])
def test_a_small_step(router: str) -> None:
    world = World()
    row = step_row(router, 16, build_tokenizer(world), world, rounds=1)
    assert row["rows"] == 128 and 80 <= row["tokens_per_row"] <= 90
    assert row["loop_s"]["tokenise"] > row["ours_s"]["tokenise_first"] > row["ours_s"]["tokenise"]
    assert any(f"ratio = {row['ratio']}" in line for line in table(row))


def test_growth() -> None:
    row = growth_row("published", 10, 500, World(), rounds=1)
    assert (row["rows"], row["languages"]) == (80, 500)
    assert row["plan_slowest_s"] >= row["plan_s"] > 0.0
    assert "500 languages" in next(table(row))
