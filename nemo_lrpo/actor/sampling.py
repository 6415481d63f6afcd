"""Token sampling whose randomness belongs to the sample, not to the batch, the rank or a global generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: Sequence[int], position: int) -> np.ndarray:
    """One number in [0, 1) per sample: float64 [B], a function of (seed, position) alone.

    splitmix64 of the seed's stream at `position`; seeds are 64-bit integers (nemo_lrpo.seeding.derive_seed).
    """
    with np.errstate(over="ignore"):
        z = np.asarray(seeds, dtype=np.uint64) + np.uint64(position + 1) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits [B, V] with everything outside the top k tokens and the nucleus of mass `top_p` at -inf."""
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token is outside when the mass before it already reaches top_p; the first one always stays.
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits


def sample_tokens(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Inverse-CDF draw from softmax(logits / temperature) after top-k and top-p: int64 [B].

    logits: [B, V] over the whole vocabulary. uniform: float64 [B] in [0, 1). temperature 0 takes the argmax. The
    cumulative sum is float64, so that a vocabulary of 10^5 tokens loses no tail.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    filtered = filter_logits(logits.float() / temperature, top_k, top_p)
    cumulative = filtered.double().softmax(dim=-1).cumsum(dim=-1)
    # Scaled by the last entry, which rounding may leave beside 1; `right` skips tokens of zero probability.
    threshold = (uniform * cumulative[:, -1]).unsqueeze(-1)
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return drawn.clamp_(max=logits.size(-1) - 1)
