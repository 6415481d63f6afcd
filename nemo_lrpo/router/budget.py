"""How many rollouts a question gets, and what a language's rollouts cost. Both off by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.router import PriceConfig, RolloutsConfig
from nemo_lrpo.router.base import RouterStateError, finite_array
from nemo_lrpo.router.cells import Cells
from nemo_lrpo.router.observed import Observed
from nemo_lrpo.router.policy import Context
from nemo_lrpo.router.state import Fit

_BISECTIONS = 64
_PRIOR_GROUPS = 4.0


def group_sizes(
    spread: NDArray[np.float64], keys: NDArray[np.uint64], total: int, low: int, high: int
) -> NDArray[np.int64]:
    """int64 [N]: `total` rollouts over N groups, K_i about in proportion to `spread`, low <= K_i <= high.

    K_i is clip(x spread_i, low, high), x such that they sum to `total`, rounded down; what is left goes one by one to
    the largest fractions, ties by key. spread: float64 [N], >= 0, all 0 is all alike. keys: uint64 [N], distinct.
    Independent of the order of groups. Raises ValueError where N groups of low to high rollouts cannot hold `total`.
    """
    count = len(spread)
    if not low * count <= total <= high * count:
        raise ValueError(
            f"{total} rollouts for {count} questions do not fit router.rollouts.min={low} to max={high} each."
        )
    order = np.argsort(keys)
    weights = spread[order] if spread.any() else np.ones(count)
    below, above = 0.0, high / max(weights[weights > 0.0].min(initial=np.inf), 1e-12)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (below + above)
        below, above = (middle, above) if np.clip(middle * weights, low, high).sum() <= total else (below, middle)
    exact = np.clip(below * weights, low, high)
    sizes = np.floor(exact).astype(np.int64)
    while (left := total - int(sizes.sum())) > 0:
        open_groups = np.flatnonzero(sizes < high)
        sizes[open_groups[np.argsort(sizes[open_groups] - exact[open_groups], kind="stable")][:left]] += 1
    result = np.empty(count, np.int64)
    result[order] = sizes
    return result


class Variation:
    """The standard deviation that a group's rewards had so far, by topics and regions: running means that keep
    `memory` of themselves a step."""

    def __init__(self, config: RolloutsConfig, languages: int) -> None:
        self._config = config
        self.cells = Cells(languages, total=(), groups=())
        """total: discounted sum of standard deviations. groups: discounted number of groups."""

    def observe(self, rows: Observed) -> None:
        """Take in a step; groups of one reward say nothing."""
        if not self._config.adaptive:
            return
        for array in self.cells.arrays.values():
            array *= self._config.memory
        cell = np.zeros(rows.groups, np.int64)
        cell[rows.group] = self.cells.claim(rows.contexts)[rows.context]
        spread = rows.spread
        compared = np.flatnonzero(spread.count > 1)
        np.add.at(self.cells.arrays["total"], cell[compared], spread.std[compared])
        np.add.at(self.cells.arrays["groups"], cell[compared], 1.0)

    def expected(self, contexts: Sequence[Context]) -> NDArray[np.float64]:
        """float64 [N]: of a group in each context, drawn towards the mean of all as by four groups of it."""
        total, groups = self.cells.arrays["total"], self.cells.arrays["groups"]
        overall = total.sum() / groups.sum() if groups.sum() > 0.0 else 0.0
        row = self.cells.find(contexts)
        known = row >= 0
        expected = np.full(len(contexts), overall)
        at = row[known]
        expected[known] = (total[at] + _PRIOR_GROUPS * overall) / (groups[at] + _PRIOR_GROUPS)
        return expected


class Price:
    """Cost of a rollout per language, from what was measured, and the price that a policy's values pay for it.

    c_l = mean cost of language l / mean of these means over the languages measured so far, 1 for the others; the means
    are of sums that keep `memory` of themselves a step. A rollout in l is charged price * c_l. Without a budget the
    price is `weight`; with one it starts there and follows the dual ascent
    price <- max(0, price + rate (cost of the step / budget - 1)).
    """

    def __init__(self, config: PriceConfig, languages: int) -> None:
        self._config = config
        self.cost = np.zeros(languages)
        """float64 [L]: discounted sum of costs."""
        self.rollouts = np.zeros(languages)
        """float64 [L]: discounted number of rollouts."""
        self.price = config.weight

    def observe(self, language: NDArray[np.integer], cost: NDArray[np.float64]) -> None:
        """Take in a step: language [R], cost float64 [R] of its rollouts."""
        memory, languages = self._config.memory, len(self.cost)
        self.cost = memory * self.cost + np.bincount(language, cost, languages)
        self.rollouts = memory * self.rollouts + np.bincount(language, minlength=languages)
        if self._config.budget is not None:
            excess = float(cost.sum()) / self._config.budget - 1.0
            self.price = max(0.0, self.price + self._config.rate * excess)

    def state(self) -> dict[str, Any]:
        """JSON values and arrays."""
        return {
            "unit": self._config.unit,
            "cost": self.cost.copy(),
            "rollouts": self.rollouts.copy(),
            "price": float(self.price),
        }

    def restore(self, part: str, saved: Mapping[str, Any], fit: Fit) -> None:
        """Continue from `state()`; costs in another unit begin anew. Raises RouterStateError, naming `part`, for a
        state that is damaged."""
        length = (len(fit.places["languages"]),)
        cost, rollouts = (
            fit.array(f"{part}.{name}", finite_array(saved, name, length), ("languages",))
            for name in ("cost", "rollouts")
        )
        price = finite_array(saved, "price", ())
        if price < 0.0 or (cost < 0.0).any() or (rollouts < 0.0).any():
            raise RouterStateError(f"router state: {part!r} holds a negative number.")
        if saved.get("unit", "tokens") != self._config.unit:
            return
        self.cost, self.rollouts = cost, rollouts
        # Without a budget the price does not move: that of the configuration holds.
        if self._config.budget is not None:
            self.price = float(price)

    @property
    def relative(self) -> NDArray[np.float64]:
        """float64 [L]: c_l."""
        known = self.rollouts > 0.0
        if not self.cost[known].sum() > 0.0:
            return np.ones(len(self.cost))
        mean = self.cost[known] / self.rollouts[known]
        relative = np.ones(len(self.cost))
        relative[known] = mean / mean.mean()
        return relative

    @property
    def charges(self) -> NDArray[np.float64] | None:
        """float64 [L]: price * c_l, None where nothing is charged."""
        return self.price * self.relative if self._config.active and self.price > 0.0 else None
