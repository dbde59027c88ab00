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
    # Into [0, 1]: neither a tiny temperature nor large logits can overflow.
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits[best]) / np.float32(sampling.temperature))
    ids = nucleus(weights, sampling.top_p)
    sums = np.cumsum(weights[ids], dtype=np.float64)
    place = np.searchsorted(sums, random.random() * sums[-1], side="right")
    return int(ids[min(int(place), len(ids) - 1)])


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest largest weights that reach ``top_p`` of their sum.

    Args:
        weights: float32 [vocab], >= 0, not all 0.
        top_p: in (0, 1].

    Returns:
        Their indices, ascending; among equal weights the lowest indices.
    """
    total = weights.sum(dtype=np.float64)
    # All weights below this floor together miss less than 1 - top_p: none of them can be in the
    # nucleus. That leaves few to sort, unless the distribution is nearly flat.
    floor = (1 - top_p) * total / len(weights)
    ids = np.flatnonzero(weights >= floor) if top_p < 1 else np.flatnonzero(weights)
    kept = weights[ids]
    ascending = np.sort(kept)
    sums = np.cumsum(ascending[::-1], dtype=np.float64)
    count = min(int(np.searchsorted(sums, top_p * total)) + 1, len(ids))
    smallest = ascending[-count]
    inside = kept > smallest
    ties = np.flatnonzero(kept == smallest)[: count - int(inside.sum())]
    inside[ties] = True
    return ids[inside]
