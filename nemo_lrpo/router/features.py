"""The feature policy: Bayesian linear regression on what a question reads like, for contexts too fine for a table.

Language l is worth phi(x) . w_l for a question x with features phi (hashing.py: its text, topics, regions, language),
the w_l joined between relatives and between all languages by `tree`. Each block of features has its variance on each
level of the tree, estimated from the data with that of the noise (empirical Bayes): a block that predicts nothing is
turned down. One model per entry of `memory` forgets at that rate, weighted by how well it predicted. p(l) is the
probability that l has the largest value, to the power `sharpness`.

What is kept is M times L times D^2 numbers, so that D shrinks with many languages: see `fitting_dimension`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_lrpo.config.router import RouterConfig
from nemo_lrpo.router.base import RouterStateError, finite_array, positive_array
from nemo_lrpo.router.hashing import ContextHasher
from nemo_lrpo.router.memories import Memories, check_same, normal_log_likelihood
from nemo_lrpo.router.policy import Context, Evidence
from nemo_lrpo.router.tree import TreePosterior, tree_posterior, updated_variances
from nemo_lrpo.router.typology import relatives

Array = NDArray[np.float64]

_PRIOR = np.array([[0.02, 0.05, 0.2, 0.2], [0.005, 0.01, 0.05, 0.05], [0.05, 0.05, 0.2, 0.2]])
"""Variances before any data, in units of the noise variance: rows are the tree's levels, from languages to all;
columns the blocks of features. A block has length 1, so that this is the variance of its part of a value."""
_PRIOR_WEIGHT = 3.0
"""What the prior variances count, in well-determined effects."""
_SMALLEST = 1e-6
"""Variances do not fall below this share of the noise variance."""
_NUMBERS = 1 << 21
"""Most numbers of one model's moments, 16 MB; time to learn grows with them, times D."""
_KNOWN_CONTEXTS = 1 << 14
"""Contexts whose features are kept; beyond, the memory starts anew."""


def fitting_dimension(wanted: int, languages: int) -> int:
    """The largest D <= wanted with languages * D^2 <= 2^21: 64 for 500 languages, 373 for 15."""
    return min(wanted, int((_NUMBERS / languages) ** 0.5))


@dataclass
class _Moments:
    """Discounted sums over a model's rollouts. gram: float64 [L, D, D], of phi phi'; product: float64 [L, D], of phi y;
    squares: of y^2; count. levels, noise: the model's variances, float64 [3, blocks] and that of a rollout."""

    gram: Array
    product: Array
    squares: float = 0.0
    count: float = 0.0
    levels: Array = field(default_factory=_PRIOR.copy)
    noise: float = 1.0


@dataclass(frozen=True)
class _Fit:
    """A model's posterior; `centre` is the mean value, which the weights are relative to."""

    centre: float
    weights: TreePosterior

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Posterior mean and variance of every language's value, float64 [C, L] each; features: [C, D]."""
        mean, variance = self.weights.predict(features)
        return self.centre + mean, variance

    def predict_one(self, language: int, features: Array) -> tuple[Array, Array]:
        """As `predict`, [C] each, of one language."""
        mean, variance = self.weights.predict_one(language, features)
        return self.centre + mean, variance


def _by_language(evidence: Evidence, languages: int) -> list[NDArray[np.int64]]:
    """The rows of each language, in their order."""
    order = np.argsort(evidence.language, kind="stable")
    return np.split(order, np.searchsorted(evidence.language[order], np.arange(1, languages)))


class FeaturePolicy:
    """See the module's docstring."""

    name = "features"
    per_question = True
    per_language = True
    state_axes: Mapping[str, tuple[str, ...]] = {
        "gram": ("", "languages", ""),
        "product": ("", "languages", ""),
    }

    def __init__(
        self, config: RouterConfig, languages: Sequence[str], topics: Sequence[str], regions: Sequence[str]
    ) -> None:
        """Topics and regions need not be declared: their names are hashed."""
        self._settings = config.features
        self._languages, self._groups = len(languages), relatives(languages)
        self._dimension = fitting_dimension(self._settings.dimension, self._languages)
        self._hasher = ContextHasher(self._dimension)
        # A cache, no state.
        self._known: dict[Context, Array] = {}
        self._triangle = np.tril_indices(self._dimension)
        self._memories = Memories(self._settings.memory)
        shape = (self._languages, self._dimension, self._dimension)
        self._moments = [_Moments(np.zeros(shape), np.zeros(shape[:2])) for _ in self._settings.memory]
        self._fits = [self._fit(moments) for moments in self._moments]

    # --- reading ----------------------------------------------------------------------------------------------------

    def probabilities(self, contexts: Sequence[Context], step: int, charges: Array | None = None) -> Array:
        """See LanguagePolicy."""
        features = self._features(contexts)
        return self._memories.probabilities(
            lambda m: self._fits[m].predict(features), charges, self._settings.sharpness
        )

    def values(self, contexts: Sequence[Context]) -> Array:
        """See LanguagePolicy: posterior means; NaN before the first rollout."""
        if not any(moments.count for moments in self._moments):
            return np.full((len(contexts), self._languages), np.nan)
        features = self._features(contexts)
        return self._memories.mean(np.stack([fit.predict(features)[0] for fit in self._fits]))

    def metrics(self, step: int) -> dict[str, float]:
        """Weight of each memory and, by weight, the standard deviations of the blocks' parts and of the noise."""
        weights = self._memories.weights
        found = {f"memory/{keep:g}": float(w) for keep, w in zip(self._settings.memory, weights)}
        for block, kind in enumerate(("language", "names", "name_text", "question_text")):
            found[f"effect/{kind}"] = float(np.sqrt(weights @ [m.levels[0, block] for m in self._moments]))
        found["noise"] = float(np.sqrt(weights @ [m.noise for m in self._moments]))
        return found

    def _features(self, contexts: Sequence[Context]) -> Array:
        """phi of each context, float64 [C, D]."""
        if len(self._known) + len(contexts) > _KNOWN_CONTEXTS:
            self._known = {}
        missing = list(dict.fromkeys(context for context in contexts if context not in self._known))
        self._known.update(zip(missing, self._hasher(missing)))
        return np.array([self._known[context] for context in contexts]).reshape(-1, self._dimension)

    # --- learning ---------------------------------------------------------------------------------------------------

    def learn(self, evidence: Evidence) -> None:
        """See LanguagePolicy."""
        features = self._features(evidence.contexts)
        by_language = _by_language(evidence, self._languages)
        rows = [features[evidence.context[at]] for at in by_language]
        values = [evidence.value[at] for at in by_language]
        if len(evidence.value):
            self._judge(rows, values)
        gram = np.stack([phi.T @ phi for phi in rows])
        # Symmetric to the bit, as only a triangle is saved.
        gram = 0.5 * (gram + gram.swapaxes(1, 2))
        product = np.stack([value @ phi for phi, value in zip(rows, values)])
        for moments, kept in zip(self._moments, self._memories.keep**evidence.steps):
            moments.gram = moments.gram * kept + gram
            moments.product = moments.product * kept + product
            moments.squares = moments.squares * kept + float((evidence.value**2).sum())
            moments.count = moments.count * kept + float(len(evidence.value))
            if moments.count >= 1.0:
                self._rescale(moments)
        self._fits = [self._fit(moments) for moments in self._moments]

    def _judge(self, rows: Sequence[Array], values: Sequence[Array]) -> None:
        """Weigh the memories by how well each predicted the window's values, by language [n] with features [n, D]."""
        self._memories.judge(
            np.array(
                [
                    sum(
                        normal_log_likelihood(value, mean, variance + moments.noise)
                        for x, (phi, value) in enumerate(zip(rows, values))
                        for mean, variance in [fit.predict_one(x, phi)]
                    )
                    for fit, moments in zip(self._fits, self._moments)
                ]
            )
        )

    def _rescale(self, moments: _Moments) -> None:
        """Move a model's variances one step towards those that make its data likeliest (MacKay)."""
        fit = self._fit(moments)
        weights, centre = fit.weights.mean, fit.centre
        product = moments.product - centre * moments.gram[:, 0]
        spread = moments.squares - moments.count * centre**2
        fitted = (moments.gram @ weights[:, :, None])[:, :, 0]
        residual = spread - 2.0 * (weights * product).sum() + (weights * fitted).sum()
        # Numbers that the data determine, of all weights together.
        known = float((moments.gram * fit.weights.covariance).sum()) / moments.noise
        noise = float(residual) / max(moments.count - known, 0.5 * moments.count)
        moments.noise = max(noise, 1e-3 * spread / moments.count, 1e-12)
        levels = updated_variances(fit.weights, self._hasher.blocks, moments.noise * _PRIOR, _PRIOR_WEIGHT)
        moments.levels = np.maximum(levels, _SMALLEST * moments.noise)

    def _fit(self, moments: _Moments) -> _Fit:
        # The first feature is 1, so that the first column of gram sums phi and that of product sums y.
        centre = float(moments.product[:, 0].sum() / max(moments.count, 1e-12))
        shift = moments.product - centre * moments.gram[:, 0]
        variances = moments.levels[:, self._hasher.blocks]
        return _Fit(
            centre, tree_posterior(moments.gram / moments.noise, shift / moments.noise, self._groups, variances)
        )

    # --- state ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See LanguagePolicy."""
        return {
            "memory": list(self._settings.memory),
            "dimension": self._dimension,
            "weights": self._memories.weights.copy(),
            # Symmetric: the lower triangle, row by row.
            "gram": np.stack([m.gram[:, self._triangle[0], self._triangle[1]] for m in self._moments]),
            "product": np.stack([m.product for m in self._moments]),
            "levels": np.stack([m.levels for m in self._moments]),
            "sums": np.array([[m.squares, m.count, m.noise] for m in self._moments]),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """See LanguagePolicy."""
        check_same(state, "memory", list(self._settings.memory), "router.features.memory")
        check_same(state, "dimension", self._dimension, "router.features.dimension")
        models, shape = len(self._moments), (self._languages, self._dimension)
        weights = positive_array(state, "weights", (models,))
        packed = finite_array(state, "gram", (models, self._languages, len(self._triangle[0])))
        gram = np.zeros((models, *shape, self._dimension))
        rows, columns = self._triangle
        gram[:, :, rows, columns] = gram[:, :, columns, rows] = packed
        product = finite_array(state, "product", (models, *shape))
        levels = positive_array(state, "levels", (models, *_PRIOR.shape))
        sums = finite_array(state, "sums", (models, 3))
        if not (sums[:, 2] > 0.0).all():
            raise RouterStateError("router state: 'sums' holds a variance of the noise that is not above 0.")
        self._memories.weights = weights
        self._moments = [_Moments(g, p, q, n, v, s) for g, p, v, (q, n, s) in zip(gram, product, levels, sums.tolist())]
        self._fits = [self._fit(moments) for moments in self._moments]
