"""Scales, and values of zero, for the blocks of a matrix.

A block of weights w is stored as integers q and read back as ``scale * (q - zero)``. Rounding to
nearest spreads the integers over the range of the weights. The search looks for the scale of the
least squared error: for each of a few ranges, wider and narrower than that of the weights, it
rounds and then fits the scale to what it rounded to, by (weighted) least squares; the best is
fitted once more.

Without zero points, zero is the middle value, 8 of 0..15, and one side has a value more. The
search gives it to the side of the largest weight: scales may be negative. That alone is worth
1.3 dB at 4 bits, the ranges another 0.2 (0.4 with 128 weights a block).

Source: the quantizers of k-quants (ggml), make_qx_quants and make_qkx2_quants.
"""

from __future__ import annotations

import numpy as np

# Ranges tried, as steps of the integers: below zero the extreme weight gets an integer nearer to
# zero than the last, above zero it is clipped. -1 and 0 are those of rounding to nearest, without
# and with zero points. Twice as many gain less than 0.03 dB.
_SYMMETRIC = tuple(np.arange(-4, 6, dtype=np.float32) / np.float32(3))
_WITH_ZERO_POINT = tuple(np.arange(-2, 7, dtype=np.float32) / np.float32(2))

_TINY = np.finfo(np.float32).tiny
_LEAST = np.float32(1e-18)  # the square of anything smaller is zero: not to be fitted


def round_to_nearest(
    blocks: np.ndarray, *, bits: int, zero_points: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The smallest scales that clip nothing.

    Args:
        blocks: float32 [..., block_size], finite.

    Returns:
        Scale and zero, float32 [...]; zero is an integer.
    """
    if zero_points:
        low, high = _range(blocks)
        scale = np.maximum((high - low) / np.float32((1 << bits) - 1), _TINY)
        return scale, np.rint(-low / scale)
    middle = np.float32(1 << (bits - 1))
    # Positive floats are ordered as their bits are, and numpy finds the largest integer faster.
    magnitude = blocks.view(np.uint32) & np.uint32(0x7FFFFFFF)
    largest = magnitude.max(axis=-1).view(np.float32)
    # A block of zeros, or of numbers so small that their scale would lose its digits, gets the
    # smallest normal number: the error stays below half a scale, and nothing is divided by zero.
    scale = np.maximum(largest / (middle - 1), _TINY)
    return scale, np.full_like(scale, middle)


def search_scales(
    blocks: np.ndarray, *, bits: int, zero_points: bool, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The scales of least squared error among those tried; never worse than one rounding.

    Args:
        blocks: float32 [rows, blocks, block_size], finite.
        importance: [blocks, block_size] >= 0, what a squared error costs; None: the same each.

    Returns:
        Scale and zero, float32 [rows, blocks]; zero is an integer. Without zero points a scale may
        be negative.
    """
    rows, count, size = blocks.shape
    # One array a position in the block: sums over a block are then sums of long arrays.
    x = np.ascontiguousarray(blocks.reshape(rows * count, size).T)
    weight = None
    if importance is not None:
        weight = np.ascontiguousarray(np.tile(importance.astype(np.float32), (rows, 1)).T)
    search = _search_with_zero_points if zero_points else _search_symmetric
    scale, zero = search(x, bits, weight)
    scale, zero = scale.reshape(rows, count), zero.reshape(rows, count)
    nearest, nearest_zero = round_to_nearest(blocks, bits=bits, zero_points=zero_points)
    unfit = ~(np.abs(scale) > _LEAST)  # zeros, or as good as: their fit is 0 / 0
    return np.where(unfit, nearest, scale), np.where(unfit, nearest_zero, zero)


def _search_symmetric(
    x: np.ndarray, bits: int, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Of x [block_size, blocks]; scale and zero [blocks]."""
    middle = np.float32(1 << (bits - 1))
    low, high = x.min(axis=0), x.max(axis=0)
    extreme = np.where(high > -low, high, low)
    extreme = np.where(np.abs(extreme) < _LEAST, _LEAST, extreme)
    zero = np.full_like(extreme, middle)
    fit = _Fit(x, bits, weight)
    for wider in _SYMMETRIC:
        fit.attempt(-(middle + wider) / extreme, zero)
    return fit.refined()


def _search_with_zero_points(
    x: np.ndarray, bits: int, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Of x [block_size, blocks]; scale and zero [blocks]."""
    top = np.float32((1 << bits) - 1)
    low, high = _range(x.T)
    width = np.maximum(high - low, _LEAST)
    fit = _Fit(x, bits, weight)
    for wider in _WITH_ZERO_POINT:
        inverse = (top + wider) / width
        zero = np.rint(top / 2 - (low + high) / 2 * inverse)
        for shift in (0, -1, 1) if wider == 0 else (0,):
            fit.attempt(inverse, np.clip(zero + shift, 0, top))
    return fit.refined()


class _Fit:
    """The best scales so far of x [block_size, blocks]."""

    def __init__(self, x: np.ndarray, bits: int, weight: np.ndarray | None) -> None:
        self._x, self._weight, self._top = x, weight, np.float32((1 << bits) - 1)
        self._buffer = np.empty_like(x)
        self._gain = np.full(x.shape[1], -1, np.float32)
        self._scale = np.ones(x.shape[1], np.float32)
        self._zero = np.zeros(x.shape[1], np.float32)

    def attempt(self, inverse: np.ndarray, zero: np.ndarray) -> None:
        """Round with these scales, fit, and keep the blocks that are better for it."""
        along, square = self._rounded(inverse, zero)
        fitted = along / np.maximum(square, _TINY)
        gain = along * fitted  # by what the squared error is less than that of storing zeros
        better = gain > self._gain
        np.copyto(self._gain, gain, where=better)
        np.copyto(self._scale, fitted, where=better)
        np.copyto(self._zero, zero, where=better)

    def refined(self) -> tuple[np.ndarray, np.ndarray]:
        """The best, fitted to what they themselves round to."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            along, square = self._rounded(1 / self._scale, self._zero)
            return along / square, self._zero

    def _rounded(self, inverse: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums over each block of x q and of q squared, q what x is rounded to."""
        q = np.multiply(self._x, inverse, out=self._buffer)
        np.rint(q, out=q)
        np.clip(q, -zero, self._top - zero, out=q)
        weighted = q if self._weight is None else q * self._weight
        return np.einsum("kb,kb->b", self._x, weighted), np.einsum("kb,kb->b", q, weighted)


def _range(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest of blocks [..., block_size], zero included: zero must stay zero."""
    zero = np.float32(0)
    return np.minimum(blocks.min(axis=-1), zero), np.maximum(blocks.max(axis=-1), zero)
