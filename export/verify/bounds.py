"""What a package may lose at most: bounds by the fewest bits of its weights and caches."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from export.verify.compare import TokenQuality
from export.verify.measure import LayerError
from export.verify.stored_weights import WeightError


@dataclass(frozen=True)
class Bound:
    """One thing that must hold.

    Attributes:
        what: of what, such as "mean KL divergence of text".
        value: found; not finite where there is no number.
        limit: the most, or the least.
        at_most: which of both.
    """

    what: str
    value: float
    limit: float
    at_most: bool

    @property
    def held(self) -> bool:
        """Whether it holds; what is no number does not."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        """As a line for a person."""
        kind = "at most" if self.at_most else "at least"
        return f"{self.what} is {self.value:.4g}, the bound is {kind} {self.limit:g}"


@dataclass(frozen=True)
class Limits:
    """Of one number of bits, see ``Bound``.

    Attributes:
        weight_db, row_db: least signal-to-noise ratio of a stored weight, of one of its rows.
        layer_db: the same of a layer's output, fed with the reference's stream.
        kl: most mean divergence of a text's next tokens, nats.
        top1: least share of tokens that both find likeliest.
    """

    weight_db: float
    row_db: float
    layer_db: float
    kl: float
    top1: float


# Normal weights in blocks of 32 have 20 dB in 4 bits and 45 dB in 8; long tails cost some of it,
# damage all. Divergences: the class of Q4_0 and Q8_0 in llama.cpp's tables with room for a text
# of a few hundred tokens.
LIMITS = {
    4: Limits(weight_db=10, row_db=0, layer_db=5, kl=0.08, top1=0.9),
    8: Limits(weight_db=34, row_db=20, layer_db=20, kl=0.01, top1=0.98),
    16: Limits(weight_db=50, row_db=30, layer_db=30, kl=0.005, top1=0.99),
    32: Limits(weight_db=120, row_db=100, layer_db=80, kl=1e-6, top1=0.999),
}

_KNOWS = 4  # a text says something if the reference's perplexity is below vocabulary / 4


def weight_bounds(weights: Iterable[WeightError]) -> list[Bound]:
    """Two bounds for each number of bits, on the weight that has lost most."""
    bounds = []
    by_bits: dict[int, list[WeightError]] = {}
    for weight in weights:
        by_bits.setdefault(weight.bits, []).append(weight)
    for bits, group in sorted(by_bits.items()):
        limits = limits_of(bits)
        for what, limit, value in (
            ("signal-to-noise ratio (dB)", limits.weight_db, lambda each: each.snr_db),
            ("worst row (dB)", limits.row_db, lambda each: each.worst_row_db),
        ):
            worst = min(group, key=value)
            bounds.append(
                Bound(f"{what} of {worst.name} ({worst.stored})", value(worst), limit, False)
            )
    return bounds


def layer_bound(layers: list[LayerError], bits: int) -> Bound:
    """On the layer that adds most error of its own."""
    worst = min(layers, key=lambda each: each.own.snr_db)
    what = f"signal-to-noise ratio (dB) of layer {worst.layer} alone, {worst.sample}"
    return Bound(what, worst.own.snr_db, limits_of(bits).layer_db, False)


def token_bounds(
    sample: str,
    quality: TokenQuality,
    bits: int,
    vocabulary: int,
    kl: float | None = None,
    top1: float | None = None,
) -> list[Bound]:
    """On a text's next tokens; none where the reference itself does not know such text.

    Args:
        kl, top1: stated by the caller, instead of the defaults; these hold for any text.
    """
    found, limits = quality.summary(), limits_of(bits)
    perplexity = found["reference_perplexity"]
    known = math.isfinite(perplexity) and perplexity < vocabulary / _KNOWS
    bounds = []
    if known or kl is not None:
        limit = limits.kl if kl is None else kl
        bounds.append(Bound(f"mean KL divergence of {sample}", found["kl_mean"], limit, True))
    if known or top1 is not None:
        limit = limits.top1 if top1 is None else top1
        bounds.append(Bound(f"top-1 agreement of {sample}", found["top1_agreement"], limit, False))
    return bounds


def limits_of(bits: int) -> Limits:
    """Limits of the nearest number of bits that is not above."""
    return LIMITS[max((each for each in LIMITS if each <= bits), default=min(LIMITS))]
