"""Rounding whose errors later columns make up for (GPTQ).

A layer's output W x changes by E x when its weights change by E, and x is known from calibration
text by its second moments H = mean of x x^T. Columns are rounded one after the other, the one with
the largest inputs first; what a column's rounding does to the output is undone, as far as H allows,
by changing the columns that are still to come.

With H^-1 = U^T U, U upper triangular, column j's error e_j / U_jj times row j of U is that change.

Source: GPTQ (arXiv 2210.17323), with its "act order"; scales are found before, from the weights.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

# Added to the diagonal, as a share of its mean: few tokens leave H singular.
_DAMPING = 0.01

# Columns whose changes are applied to the rest at once, as one product of matrices.
_LAZY = 64

_SMALL = 128  # side of a matrix that is factored directly


class Calibration(Protocol):
    """What is known of a linear layer's inputs x."""

    def second_moments(self) -> np.ndarray:
        """Mean of x x^T, [columns, columns] float32, symmetric, not all zero."""
        ...

    def mean_squares(self) -> np.ndarray:
        """The diagonal of it, [columns] float32."""
        ...


class Compensation:
    """Rounds rows of matrices that share their inputs."""

    def __init__(self, calibration: Calibration) -> None:
        """Factor the inverse of the second moments; takes the memory of two such matrices.

        Raises:
            ValueError: they are all zero, not finite or no moments.
        """
        moments = calibration.second_moments()
        diagonal = np.diagonal(moments).astype(np.float32)
        if not np.isfinite(diagonal).all() or diagonal.max(initial=0) <= 0:
            raise ValueError("the second moments of its inputs are all zero, or not finite")
        self._order = np.argsort(-diagonal, kind="stable")
        self._upper = moments[np.ix_(self._order, self._order)]
        del moments
        self._upper[np.diag_indices_from(self._upper)] += np.float32(_DAMPING) * diagonal.mean()
        _factor_inverse(self._upper)

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


def _factor_inverse(matrix: np.ndarray) -> None:
    """Replace a positive definite matrix by the upper triangular U with U^T U its inverse.

    By halves, as products of matrices. numpy's own Cholesky computes in float64: twice the time,
    and eight times the memory.
    """
    side = len(matrix)
    if side <= _SMALL:
        # Backwards, the lower factor of Cholesky's is an upper one, R with R R^T the matrix.
        upper = np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
        matrix[:] = np.triu(np.linalg.inv(upper))
        return
    half = side // 2
    first, corner, second = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    _factor_inverse(second)
    shared = corner @ second.T  # the corner of R
    first -= shared @ shared.T
    _factor_inverse(first)
    np.matmul(first @ shared, -second, out=corner)
    matrix[half:, :half] = 0
