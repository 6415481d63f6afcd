"""The hierarchical Bayesian policy: a language's value as a sum of effects whose sizes the data tell.

In a context with topics T and regions G (either may be several: their effects average), language l is worth

    f_l = a_l + mean_{t in T} b_{t,l} + mean_{g in G} d_{g,l} + e_{TG,l},      value of a rollout = f_l + b_q + noise,

all effects normal. b_q is the question's, the same in all languages, and taken out first (questions.py). a, b and d are
joined between relatives and between all languages (tree.py), so that a new language or region starts from what is known
of its relatives; e is the context's own. The variance of every kind of effect and of the noise is estimated (empirical
Bayes), so that regions are soon ignored where they do not matter. How far to look back is estimated too: one model per
entry of `memory` forgets at that rate, weighted by how well it predicted the last windows. p(l) is the probability,
under that mixture, that l has the largest value, to the power `sharpness`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.router.base import finite_array, positive_array
from nemo_lrpo.router.cell_features import CellFeatures, Design, Predictions
from nemo_lrpo.router.memories import Memories, check_same, normal_log_likelihood
from nemo_lrpo.router.policy import Cell, Context, Evidence
from nemo_lrpo.router.questions import QuestionEffects, WindowSums
from nemo_lrpo.router.tables import STATE_AXES, CellTable
from nemo_lrpo.router.tree import tree_posterior, updated_variances
from nemo_lrpo.router.typology import relatives

Array = NDArray[np.float64]
Index = NDArray[np.int64]

_BLOCKS = 3
"""Kinds of effects with a variance of their own on each level of the tree: a, b, d."""
_PRIOR = np.array([[0.005] * _BLOCKS, [0.001] * _BLOCKS, [0.05] * _BLOCKS])
"""Variances before any data, in units of the noise variance: of languages around their relatives, of relatives around
all languages, of what all languages share."""
_PRIOR_OWN = 0.2
"""Likewise, of e."""
_PRIOR_WEIGHT = 1.0
"""What the prior variances count, in well-determined effects."""
_SMALLEST = 1e-6
"""Variances do not fall below this share of the noise variance."""
_MOST_COLUMNS = 128
"""Topics, and regions, with an effect of their own; the rest of a longer list shares that of the undeclared. Time grows
with the third power, memory with the second."""
_FRESH = 0.25
"""Share of a model's data that is of the last window, above which its variances are found with that window; below, they
move so little that its last fit, without the window, does."""
_LEAST_NOISE = 1e-12
"""Of the noise variance: where all values of every cell are equal."""
_NOTHING = 1e-12
"""Counts below this are none."""


@dataclass(frozen=True)
class _Scales:
    """What one model takes the sizes to be, as variances. levels: float64 [3, 3], (level of the tree, kind of effect);
    own: of e; noise: of a rollout."""

    levels: Array = field(default_factory=_PRIOR.copy)
    own: float = _PRIOR_OWN
    noise: float = 1.0


@dataclass(frozen=True)
class _Fit:
    """What one model knows since it last learned. centre: mean of all values, which effects are relative to."""

    centre: float
    effects: Predictions
    scales: _Scales

    def predict(self, rows: Index, count: Array, total: Array) -> tuple[Array, Array, Array, Array]:
        """Of the cells in `rows` of the features [C], whose values number `count` and sum to `total` [C, L]: posterior
        mean and variance of f, posterior mean of e, and the part of e that the data determine; float64 [C, L] each."""
        own, noise = self.scales.own, self.scales.noise
        mean, variance = self.effects(rows)
        # Given the other effects, the cell's own data pull f from their sum towards the cell's mean by `gain`.
        gain = own * count / (own * count + noise)
        # Not 1 - gain, which rounds to zero where the noise is far below e.
        kept = noise / (own * count + noise)
        away = gain * (total / np.maximum(count, _NOTHING) - self.centre - mean)
        return (
            self.centre + mean + away,
            kept**2 * variance + own * kept,
            away,
            np.maximum(gain - gain**2 * variance / own, 0.0),
        )


class HierarchicalPolicy:
    """Languages' values by topic, region and context; see the module's docstring."""

    name = "hierarchical"
    per_question = False
    per_language = False
    state_axes = STATE_AXES

    def __init__(
        self, config: RouterConfig, languages: Sequence[str], topics: Sequence[str], regions: Sequence[str]
    ) -> None:
        """`topics`, `regions`: those with effects of their own, up to 128 each; others share one effect, as one more of
        each. Every context has its own e in any case."""
        self._settings = config.hierarchical
        self._languages, self._groups = len(languages), relatives(languages)
        # A cache, no state.
        self._features = CellFeatures(topics[:_MOST_COLUMNS], regions[:_MOST_COLUMNS])
        self._blocks = np.repeat(np.arange(_BLOCKS), self._features.widths)
        self._memories = Memories(self._settings.memory)
        models = len(self._settings.memory)
        self._table = CellTable(models, self._languages)
        self._questions = QuestionEffects.unknown()
        self._scales = [_Scales() for _ in range(models)]
        # Discounted sum of squares within cells and windows, and its degrees of freedom.
        self._squares, self._freedom = np.zeros(models), np.zeros(models)
        self._refit(self._design()[1])

    # --- reading ----------------------------------------------------------------------------------------------------

    def probabilities(self, contexts: Sequence[Context], step: int, charges: Array | None = None) -> Array:
        """See LanguagePolicy."""
        if charges is not None:
            return self._best(contexts, charges)
        # The same until the next window; a cache, no state.
        missing = {c.cell: c for c in contexts if c.cell not in self._known}
        if missing:
            self._best_known = np.concatenate([self._best_known, self._best(list(missing.values()), None)])
            self._known.update(zip(missing, range(len(self._known), len(self._best_known))))
        return self._best_known[[self._known[c.cell] for c in contexts]]

    def values(self, contexts: Sequence[Context]) -> Array:
        """See LanguagePolicy: posterior means; NaN before the first window."""
        if not self._freedom.any():
            return np.full((len(contexts), self._languages), np.nan)
        return self._memories.mean(self._predicted(contexts)[0])

    def metrics(self, step: int) -> dict[str, float]:
        """Weight of each memory and, by weight, the standard deviations of effects and noise."""
        weights = self._memories.weights
        found = {f"memory/{keep:g}": float(w) for keep, w in zip(self._settings.memory, weights)}
        for block, kind in enumerate(("language", "topic", "region")):
            found[f"effect/{kind}"] = float(np.sqrt(weights @ [s.levels[0, block] for s in self._scales]))
        found["effect/context"] = float(np.sqrt(weights @ [s.own for s in self._scales]))
        found["effect/question"] = float(np.sqrt(self._questions.variances[1]))
        found["noise"] = float(np.sqrt(weights @ [s.noise for s in self._scales]))
        return found

    def _best(self, contexts: Sequence[Context], charges: Array | None) -> Array:
        predicted = self._predictor(contexts)
        return self._memories.probabilities(lambda m: predicted(m)[:2], charges, self._settings.sharpness)

    def _predicted(self, contexts: Sequence[Context]) -> tuple[Array, Array]:
        """Posterior mean and variance of every f, float64 [M, C, L] each."""
        means, variances, *_ = zip(*map(self._predictor(contexts), range(len(self._fits))))
        return np.stack(means), np.stack(variances)

    def _predictor(self, contexts: Sequence[Context]) -> Callable[[int], tuple[Array, Array, Array, Array]]:
        """A model's number to what its `_Fit.predict` says of the contexts."""
        rows = self._features.rows([context.cell for context in contexts])
        count, total = self._table.read(contexts)
        return lambda m: self._fits[m].predict(rows, count[:, m], total[:, m])

    def _design(self) -> tuple[Index, Design]:
        """Rows of all cells of the table in the features, and their phi."""
        rows = self._features.rows(self._table.cells)
        return rows, Design(self._features.phi(rows))

    # --- learning ---------------------------------------------------------------------------------------------------

    def learn(self, evidence: Evidence) -> None:
        """See LanguagePolicy."""
        kept = self._memories.keep**evidence.steps
        means, variances = self._predicted(evidence.contexts)
        window = self._questions.take_out(evidence, self._memories.mean(means))
        if len(evidence.value):
            self._judge(window, means, variances)
        self._table.decay(kept)
        self._table.add(evidence.contexts, window.count, window.total)
        self._squares = self._squares * kept + window.squares
        self._freedom = self._freedom * kept + window.freedom
        rows, design = self._design()
        self._scales = [self._rescaled(m, rows, design, window.freedom) for m in range(len(self._scales))]
        self._refit(design)

    def _judge(self, window: WindowSums, means: Array, variances: Array) -> None:
        """Weigh the memories by how well each predicted the means of the window's cells; [M, C, L]."""
        seen = window.count > 0
        count = window.count[seen]
        value = window.total[seen] / count
        self._memories.judge(
            np.array(
                [
                    normal_log_likelihood(value, mean[seen], variance[seen] + scales.noise / count)
                    for mean, variance, scales in zip(means, variances, self._scales)
                ]
            )
        )

    def _rescaled(self, m: int, rows: Index, design: Design, fresh: float) -> _Scales:
        """Model m's scales, variances moved one step towards those that make its data likeliest (MacKay). `fresh`:
        degrees of freedom that the window brought."""
        if self._freedom[m] < 1.0:
            return self._scales[m]
        noise = max(float(self._squares[m] / self._freedom[m]), _LEAST_NOISE)
        fit = self._fit(m, design) if fresh > _FRESH * self._freedom[m] else self._fits[m]
        *_, own, known = fit.predict(rows, *self._data(m))
        levels = updated_variances(fit.effects.posterior, self._blocks, noise * _PRIOR, _PRIOR_WEIGHT)
        of_own = ((own**2).sum() + _PRIOR_WEIGHT * noise * _PRIOR_OWN) / (known.sum() + _PRIOR_WEIGHT)
        least = _SMALLEST * noise
        return _Scales(np.maximum(levels, least), max(float(of_own), least), noise)

    def _refit(self, design: Design) -> None:
        """Take the data in under the present scales; what was predicted before no longer holds."""
        self._fits = [self._fit(m, design) for m in range(len(self._scales))]
        self._known: dict[Cell, int] = {}
        self._best_known = np.zeros((0, self._languages))

    def _fit(self, m: int, design: Design) -> _Fit:
        """Model m's posterior of all effects; `design`: of all cells of the table."""
        scales = self._scales[m]
        count, total = self._data(m)
        centre = float(total.sum() / max(count.sum(), _NOTHING))
        # A cell's mean has the variance of e on top of that of the noise.
        weight = count / (scales.own * count + scales.noise)
        shift = (weight * (total / np.maximum(count, _NOTHING) - centre)).T @ design.phi
        posterior = tree_posterior(design.information(weight), shift, self._groups, scales.levels[:, self._blocks])
        return _Fit(centre, Predictions(self._features, posterior), scales)

    def _data(self, m: int) -> tuple[Array, Array]:
        """Number and sum of values that model m remembers, float64 [C, L] each."""
        return self._table.count[:, m], self._table.total[:, m]

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See LanguagePolicy."""
        return {
            "memory": list(self._settings.memory),
            **self._table.state(),
            "weights": self._memories.weights,
            "questions": self._questions.sums.copy(),
            "squares": self._squares,
            "freedom": self._freedom,
            "levels": np.stack([s.levels for s in self._scales]),
            "own": np.array([s.own for s in self._scales]),
            "noise": np.array([s.noise for s in self._scales]),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """See LanguagePolicy."""
        models = len(self._scales)
        check_same(state, "memory", list(self._settings.memory), "router.hierarchical.memory")
        table = self._table.loaded(state)
        squares, freedom = (finite_array(state, name, (models,)) for name in ("squares", "freedom"))
        weights, own, noise = (positive_array(state, name, (models,)) for name in ("weights", "own", "noise"))
        questions = finite_array(state, "questions", self._questions.sums.shape)
        levels = positive_array(state, "levels", (models, *_PRIOR.shape))
        self._table, self._questions = table, QuestionEffects(questions)
        self._memories.weights, self._squares, self._freedom = weights, squares, freedom
        self._scales = [_Scales(*each) for each in zip(levels, own.tolist(), noise.tolist())]
        self._refit(self._design()[1])
