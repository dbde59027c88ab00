"""How far numbers are from those they should be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

_ROWS = 16  # of logits in float64 at once: 26 MB at a vocabulary of 200,064
_LARGEST_EXPONENT = 709
_DECADES = np.arange(-10, 2.01, 0.5)  # edges of the histogram, as powers of ten


@dataclass(frozen=True)
class Error:
    """Distance of an array from its reference.

    Attributes:
        snr_db: 10 log10 of the reference's energy over the error's; infinite where both are equal,
            minus infinity where something that is no number was found.
        relative: root mean square of the error over that of the reference.
        largest: absolute.
    """

    snr_db: float
    relative: float
    largest: float


def error_of(reference: np.ndarray, found: np.ndarray) -> Error:
    """Compare two arrays of one shape.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != found.shape:
        raise ValueError(f"found shape {list(found.shape)}, expected {list(reference.shape)}")
    wanted = reference.astype(np.float64)
    difference = found.astype(np.float64) - wanted
    if not np.isfinite(difference).all():
        return Error(-math.inf, math.inf, math.inf)
    energy, noise = float(np.square(wanted).sum()), float(np.square(difference).sum())
    largest = float(np.abs(difference).max(initial=0.0))
    return Error(snr(energy, noise), math.sqrt(noise / energy) if energy else math.nan, largest)


def snr(energy: float, noise: float) -> float:
    """Signal-to-noise ratio in decibels."""
    if noise == 0:
        return math.inf
    if energy == 0 or not math.isfinite(noise):
        return -math.inf
    return 10 * math.log10(energy / noise)


def divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL divergence of softmax(logits) from softmax(reference), float64 in nats.

    Args:
        reference: [rows, vocab].
        logits: [..., rows, vocab], any number of models.

    Returns:
        [..., rows].
    """
    found = np.empty(logits.shape[:-1])
    for rows in _blocks(len(reference)):
        wanted = log_softmax(reference[rows])
        probabilities = np.exp(wanted)
        for model in np.ndindex(logits.shape[:-2]):
            given = log_softmax(logits[*model, rows])
            found[*model, rows] = _nats(probabilities, wanted, given)
    return found


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, rows, _ROWS))


def _nats(probabilities: np.ndarray, wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Divergence of rows by their probabilities' logarithms; infinite where there is no number."""
    nats = np.einsum("ij,ij->i", probabilities, wanted - given)
    return np.where(np.isnan(nats), np.inf, np.maximum(nats, 0))  # below zero is rounding


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities, float64 [rows, vocab]; NaN in a row that is not finite."""
    shifted = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


@dataclass
class TokenQuality:
    """What a text's next-token distributions have lost; blocks of tokens are added one by one.

    Attributes:
        divergences: nats, one a token.
        agreed: whether both find the same token likeliest.
        losses, reference_losses: minus log probability of the token that follows.
    """

    divergences: list[float] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)

    def add(self, reference: np.ndarray, logits: np.ndarray, following: Sequence[int]) -> None:
        """Count a block.

        Args:
            reference, logits: [tokens, vocab].
            following: the token after each; one fewer at the text's end.
        """
        for rows in _blocks(len(reference)):
            wanted, given = log_softmax(reference[rows]), log_softmax(logits[rows])
            self.divergences += _nats(np.exp(wanted), wanted, given).tolist()
            # One NaN makes a row of them, whose largest is the first.
            agreed = (wanted.argmax(-1) == given.argmax(-1)) & ~np.isnan(given[:, 0])
            self.agreed += agreed.tolist()
            tokens = list(following[rows])
            places = range(len(tokens)), tokens
            self.reference_losses += (-wanted[places]).tolist()
            self.losses += (-given[places]).tolist()

    def summary(self) -> dict[str, float]:
        """Mean, median and extremes of the divergence, agreement, perplexities."""
        kl = np.array(self.divergences)
        own, reference = (
            float(np.mean(each or [math.nan])) for each in (self.losses, self.reference_losses)
        )
        return {
            "tokens": len(kl),
            "kl_mean": float(kl.mean()),
            "kl_median": float(np.quantile(kl, 0.5, method="lower")),
            "kl_p99": float(np.quantile(kl, 0.99, method="lower")),
            "kl_max": float(kl.max()),
            "top1_agreement": float(np.mean(self.agreed)),
            "perplexity": _exp(own),
            "reference_perplexity": _exp(reference),
            "perplexity_ratio": _exp(own - reference),
        }

    def histogram(self) -> tuple[list[float], list[int]]:
        """Edges, in powers of ten, and tokens between them; the outer bins take what is beyond."""
        powers = np.log10(np.maximum(self.divergences, 1e-300)).clip(_DECADES[0], _DECADES[-1])
        counts, edges = np.histogram(powers, _DECADES)
        return edges.tolist(), counts.tolist()


def _exp(nats: float) -> float:
    """Infinite where a damaged package is surprised beyond all numbers."""
    return math.inf if nats > _LARGEST_EXPONENT else math.exp(nats)
