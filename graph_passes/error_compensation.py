"""Rounding whose errors later columns make up for (GPTQ).

A layer's output W x changes by E x when its weights change by E, and x is known from calibration
text by its second moments H = mean of x x^T. Columns are rounded one after the other, the one with
the largest inputs first; what a column's rounding does to the output is undone, as far as H allows,
by changing the columns that are still to come.

With H^-1 = U^T U, U upper triangular, column j's error e_j / U_jj times row j of U is that change.

Source: GPTQ (arXiv 2210.17323), with its "act order"; scales are found before, from the weights.
"""

from __future__ import annotations

import numpy as np

# Added to the diagonal, as a share of its mean: few tokens leave H singular.
_DAMPING = 0.01

# Columns whose changes are applied to the rest at once, as one product of matrices.
_LAZY = 64

_SMALL = 128  # side of a triangle that is inverted directly


class Compensation:
    """Rounds rows of matrices that share their inputs."""

    def __init__(self, second_moments: np.ndarray) -> None:
        """Factor the inverse.

        Args:
            second_moments: [columns, columns] float32, symmetric, positive semidefinite, not all
                zero. No copy is kept: given away by the caller, it is freed before the factor is
                computed, which takes three matrices of this size.
        """
        diagonal = np.diagonal(second_moments).astype(np.float32)
        if not np.isfinite(diagonal).all() or diagonal.max(initial=0) <= 0:
            raise ValueError("the second moments of its inputs are all zero, or not finite")
        self._order = np.argsort(-diagonal, kind="stable")
        # Backwards, the lower factor of Cholesky's is the upper one.
        backwards = self._order[::-1]
        matrix = second_moments[np.ix_(backwards, backwards)]
        del second_moments
        matrix[np.diag_indices_from(matrix)] += np.float32(_DAMPING) * diagonal.mean()
        lower = np.linalg.cholesky(matrix)
        del matrix
        self._upper = np.ascontiguousarray(lower[::-1, ::-1])
        del lower
        _invert_upper(self._upper)

    def stored(
        self,
        rows: np.ndarray,
        scale: np.ndarray,
        zero: np.ndarray,
        *,
        bits: int,
        block_size: int,
    ) -> np.ndarray:
        """Round rows.

        Args:
            rows: [rows, columns] float32.
            scale, zero: [rows, blocks] float32; zero is an integer.

        Returns:
            uint8 [rows, columns], each 0 .. 2^bits - 1.
        """
        order, upper, top = self._order, self._upper, np.float32((1 << bits) - 1)
        count, columns = rows.shape
        scales, zeros = scale.T.copy(), zero.T.copy()
        left = np.ascontiguousarray(rows.T[order])  # [columns, rows]: a column lies together
        stored = np.empty((columns, count), np.uint8)
        errors = np.empty((_LAZY, count), np.float32)
        for start in range(0, columns, _LAZY):
            stop = min(start + _LAZY, columns)
            for j in range(start, stop):
                block = order[j] // block_size
                value = np.clip(np.rint(left[j] / scales[block]) + zeros[block], 0, top)
                stored[order[j]] = value
                error = left[j] - (value - zeros[block]) * scales[block]
                error /= upper[j, j]
                errors[j - start] = error
                left[j + 1 : stop] -= upper[j, j + 1 : stop, None] * error
            left[stop:] -= upper[start:stop, stop:].T @ errors[: stop - start]
        return np.ascontiguousarray(stored.T)


def _invert_upper(matrix: np.ndarray) -> None:
    """Invert an upper triangular matrix in place, halves first."""
    side = len(matrix)
    if side <= _SMALL:
        matrix[:] = np.triu(np.linalg.inv(matrix))
        return
    half = side // 2
    first, second, corner = matrix[:half, :half], matrix[half:, half:], matrix[:half, half:]
    _invert_upper(first)
    _invert_upper(second)
    corner[:] = -(first @ corner) @ second
