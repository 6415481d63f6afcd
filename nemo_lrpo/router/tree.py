"""Exact Gaussian inference for linear models of many languages, joined in a tree of relatives.

The value of language l in a context with features phi (float64 [D]) is phi . w_l, where

    w_l = w_group(l) + N(0, Q_language),   w_group = w_all + N(0, Q_group),   w_all ~ N(0, Q_all)

with diagonal Q. w_all is what all languages share (a hard topic is hard in each), w_group what relatives share. A
language without data therefore has the posterior of its group, a group without data that of all languages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_TILE = 64
"""Rows."""
_CHUNK = 1 << 21
"""Entries of [L, rows, D] that are worked on at once."""


@dataclass(frozen=True)
class TreePosterior:
    """mean: float64 [L, D] and covariance: float64 [L, D, D] of each language's w; across languages not kept.

    steps, knowledge: float64 [3, D], per level, summed over its nodes: the squared posterior mean of the node's step
    from its parent, and 1 - posterior variance / prior variance of that step, the part of it that the data determine.
    """

    mean: Array
    covariance: Array
    steps: Array
    knowledge: Array

    def predict(self, features: Array) -> tuple[Array, Array]:
        """Mean and variance of phi . w_l, float64 [C, L] each, for `features` [C, D].

        A row's result is the same to the bit whatever rows come with it, as a resumed run asks in other company.
        """
        # Matrix products take the rows past the last full tile another way, which rounds differently.
        padded = np.zeros((-(-len(features) // _TILE) * _TILE, features.shape[1]))
        padded[: len(features)] = features
        mean = padded @ self.mean.T
        variance = np.empty_like(mean)
        rows = max(1, _CHUNK // (self.mean.size * _TILE)) * _TILE
        for start in range(0, len(padded), rows):
            part = padded[start : start + rows]
            np.einsum("lcd,cd->cl", part @ self.covariance, part, out=variance[start : start + rows])
        return mean[: len(features)], _not_negative(variance[: len(features)])

    def predict_one(self, language: int, features: Array) -> tuple[Array, Array]:
        """As `predict`, [C] each, of one language."""
        variance = ((features @ self.covariance[language]) * features).sum(axis=1)
        return features @ self.mean[language], _not_negative(variance)


def _not_negative(variance: Array) -> Array:
    """Rounding may leave the smallest ones below zero where effects differ in size by many orders."""
    return np.maximum(variance, 0.0)


@dataclass(frozen=True)
class _Node:
    """A level's nodes given their parents: w = gain (parent) + own + N(0, covariance)."""

    own: Array  # [N, D]
    gain: Array  # [N, D, D]
    covariance: Array  # [N, D, D]


def tree_posterior(information: Array, shift: Array, groups: Sequence[int], variances: Array) -> TreePosterior:
    """Posterior of every w_l. `information`: float64 [L, D, D], sum of phi phi' / noise variance; `shift`: float64
    [L, D], sum of phi y / noise variance; `groups`: L numbers from 0; `variances`: float64 [3, D] > 0, the diagonals
    of Q_language, Q_group, Q_all.

    Upwards, each node tells its parent what the data below it say; downwards, each takes its parent's posterior in.
    """
    members = np.asarray(groups)
    languages, up = _condition(information, shift, variances[0])
    groups_information, groups_shift = (_sum_by(members, part) for part in up)
    branches, up = _condition(groups_information, groups_shift, variances[1])
    root, _ = _condition(up[0].sum(axis=0)[None], up[1].sum(axis=0)[None], variances[2])
    levels = [_descend(root, np.zeros((1, shift.shape[1])), np.zeros_like(root.gain))]
    levels.append(_descend(branches, levels[0][0], levels[0][1]))
    levels.append(_descend(languages, levels[1][0][members], levels[1][1][members]))
    mean, covariance = levels[2][:2]
    # From languages to all, the order of `variances`.
    steps = np.stack([(step**2).sum(axis=0) for _, _, step, _ in reversed(levels)])
    spread = np.stack([(1.0 - var / q).sum(axis=0) for (_, _, _, var), q in zip(reversed(levels), variances)])
    return TreePosterior(mean, covariance, steps, np.maximum(spread, 0.0))


def _condition(information: Array, shift: Array, variance: Array) -> tuple[_Node, tuple[Array, Array]]:
    """A level's nodes given parent and data, and what they tell their parents (information, shift).

    With B = I + Q^1/2 information Q^1/2, whose eigenvalues are at least 1: covariance Q^1/2 B^-1 Q^1/2, message
    Q^-1/2 (I - B^-1) Q^-1/2, the inverse of information^-1 + Q, also where information is singular.
    """
    root = np.sqrt(variance)
    identity = np.eye(len(variance))
    square = root[:, None] * root
    inverse = np.linalg.inv(identity + square * information)
    inverse = 0.5 * (inverse + inverse.swapaxes(1, 2))
    covariance = square * inverse
    own = (covariance @ shift[:, :, None])[:, :, 0]
    node = _Node(own, inverse * (root[:, None] / root), covariance)
    return node, ((identity - inverse) / square, own / variance)


def _descend(node: _Node, parent: Array, parent_covariance: Array) -> tuple[Array, Array, Array, Array]:
    """Posterior mean [N, D] and covariance [N, D, D] of a level, and mean and variance [N, D] of its steps.

    parent, parent_covariance: posterior of each node's parent, [N or 1, D] and [N or 1, D, D].
    """
    mean = node.own + (node.gain @ np.broadcast_to(parent, node.own.shape)[:, :, None])[:, :, 0]
    carried = node.gain @ parent_covariance
    covariance = node.covariance + carried @ node.gain.swapaxes(1, 2)
    # Of (gain - 1) parent + own.
    away = node.gain - np.eye(node.own.shape[1])
    step_variance = np.einsum("nii->ni", node.covariance) + ((carried - parent_covariance) * away).sum(axis=2)
    return mean, covariance, mean - parent, step_variance


def _sum_by(members: NDArray[np.int64], values: Array) -> Array:
    """Sums over the rows of each member number; every number from 0 to the largest occurs."""
    order = np.argsort(members, kind="stable")
    starts = np.searchsorted(members[order], np.arange(int(members.max()) + 1))
    return np.add.reduceat(values[order], starts, axis=0)


def updated_variances(posterior: TreePosterior, blocks: Sequence[int], prior: Array, weight: float) -> Array:
    """One fixed-point step of the variances towards the maximum of the marginal likelihood (MacKay). [3, blocks].

    blocks: D numbers from 0; the dimensions of a block share a variance per level:
    v = (sum of squared steps + weight prior) / (sum of knowledge + weight), so that without data v is `prior`, float64
    [3, blocks].
    """
    sums = np.eye(prior.shape[1])[np.asarray(blocks)]
    return (posterior.steps @ sums + weight * prior) / (posterior.knowledge @ sums + weight)
