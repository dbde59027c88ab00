"""Choose the next token from logits: greedy, or from the nucleus of the distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from runtime_py.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Defaults are those the published model recommends.

    Attributes:
        temperature: divides the logits; 0 always takes the most likely token.
        top_p: only the fewest most likely tokens that together reach this probability count.
        seed: makes an answer repeatable; None differs each time.

    Raises:
        InputError: a value has no meaning.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse what has no meaning, so that it is told before a model runs."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; give more than 0, at most 1")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed is {self.seed}; give 0 or more")

    def random(self) -> np.random.Generator:
        """The source of chance of one answer."""
        return np.random.default_rng(self.seed)


def choose(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """Choose a token.

    Args:
        logits: float32 [vocab]; minus infinity rules a token out.
        sampling: temperature and top_p.
        random: source of chance; not used at temperature 0.

    Returns:
        Token id. Among equally likely ones the lowest comes first.

    Raises:
        ArithmeticError: the logits hold NaN or infinity.
    """
    best = int(logits.argmax())  # NaN counts as the largest
    if not np.isfinite(logits[best]):
        raise ArithmeticError(f"logit {best} is {logits[best]}: the model's weights are broken")
    if sampling.temperature == 0:
        return best
    warmth = np.float32(max(sampling.temperature, 1e-30))  # a smaller one would become 0
    weights = logits - logits[best]
    with np.errstate(over="ignore"):  # far below the best: minus infinity, weight 0
        np.exp(np.divide(weights, warmth, out=weights), out=weights)
    ids = nucleus(weights, sampling.top_p)
    sums = np.cumsum(weights[ids], dtype=np.float64)
    return int(ids[np.searchsorted(sums, random.random() * sums[-1], side="right")])


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest largest weights that reach ``top_p`` of their sum.

    Args:
        weights: float32 [vocab], contiguous, >= 0, not all 0.
        top_p: in (0, 1].

    Returns:
        Their indices, ascending; among equal weights the lowest come first.
    """
    total = weights.sum(dtype=np.float64)
    # All weights below this floor together miss less than 1 - top_p, so none of them belongs to
    # the nucleus. Little is left where the model is sure of itself.
    floor = (1 - top_p) * total / len(weights)
    ids = np.flatnonzero((weights >= floor) & (weights > 0))
    kept = weights[ids]
    # Where it is not, sorting would take long. The upper 16 bits of positive floats order them:
    # sum by those, and sort only the weights that share the boundary's bits.
    bits = (kept.view(np.uint32) >> 16).astype(np.intp)
    sums = np.bincount(bits, weights=kept)[::-1].cumsum()  # [i]: the i + 1 topmost buckets
    goal = min(top_p * total, sums[-1])
    place = int(np.searchsorted(sums, goal))
    edge = np.flatnonzero(bits == len(sums) - 1 - place)
    edge = edge[np.argsort(-kept[edge], kind="stable")]  # lowest first among equals
    missing = goal - (sums[place - 1] if place else 0)
    count = int(np.searchsorted(np.cumsum(kept[edge], dtype=np.float64), missing)) + 1
    inside = bits >= len(sums) - place
    inside[edge[:count]] = True
    return ids[inside]
