"""What it means for a run to go on with another number of ranks."""

from __future__ import annotations

from collections.abc import Mapping


def layout_news(before: Mapping[str, int], now: Mapping[str, int]) -> str | None:
    """What changes for a run that was saved on the ranks `before` (parallel size by axis) and goes on on `now`.

    None where the layout is the same.
    """
    if before == now:
        return None
    sizes = [f"{axis} {before.get(axis, 1)} -> {now.get(axis, 1)}" for axis in {**before, **now}]
    return (
        f"Parallel layout: {', '.join(sizes)}.\n"
        "  Reshaped from the checkpoint's shards: model weights and optimizer state.\n"
        "  As they were: router, learning rate; questions, languages and rollouts, drawn from (seed, step, question,\n"
        "  slot).\n"
        "  Reseeded: dropout, where the model has any; its masks are drawn from (seed, step, rank).\n"
        "  Sums over ranks are taken in another order: values agree to rounding, not bit by bit."
    )
