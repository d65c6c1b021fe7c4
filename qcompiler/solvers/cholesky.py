"""Cholesky factorization of large symmetric matrices in their own memory, and what brings them into order.

Torch's leaves a matrix that turns out not to be positive definite destroyed, and so needs a copy of each. Here one
triangle stays as it was until the other one is done.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.numerics import add_gram

_BLOCK = 256  # `add_gram` changes nothing below the diagonal outside of blocks of this size
_SOLVED = 64  # triangular matrices up to this size are inverted by solving
_ELEMENTS = 2**20  # that are moved at once


def cholesky_(matrix: Tensor, diagonal: Tensor) -> bool:
    """Make a symmetric `matrix` (float32 [I, I]), with this diagonal, U of U^T U, upper triangular; the rest is zero.

    False where it is not positive definite: then it is as it was, but for its diagonal. By blocks of rows, the usual
    right-looking way (Golub and Van Loan, "Matrix Computations", section 4.2): the time goes into matrix products.
    """
    size = len(matrix)
    spans = [slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK)]
    matrix.diagonal().copy_(diagonal)
    own = [matrix[span, span].clone() for span in spans]
    for span in spans:
        block = matrix[span, span]
        lower, failed = torch.linalg.cholesky_ex(block.triu().mT)
        if bool(failed):
            _restore(matrix, spans, own)
            return False
        block.copy_(lower.mT)
        right = matrix[span, span.stop :]
        if right.numel():
            right.copy_(_inverse(lower) @ right)  # BLAS libraries solve much slower than they multiply
            add_gram(matrix[span.stop :, span.stop :], right, alpha=-1)
    for span in spans:
        matrix[span.stop :, span] = 0
    return True


def _inverse(lower: Tensor) -> Tensor:
    """Of a lower triangular matrix, by halves."""
    size = len(lower)
    if size <= _SOLVED:
        solved: Tensor = torch.linalg.solve_triangular(lower, torch.eye(size, device=lower.device), upper=False)
        return solved
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _inverse(lower[:half, :half])
    inverse[half:, half:] = _inverse(lower[half:, half:])
    inverse[half:, :half] = inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half]).neg_()
    return inverse


def _restore(matrix: Tensor, spans: list[slice], own: list[Tensor]) -> None:
    for span, block in zip(spans, own, strict=True):
        matrix[span, span] = block
        matrix[span, span.stop :] = matrix[span.stop :, span].t()


def reorder_(matrix: Tensor, order: Tensor) -> None:
    """Bring the rows and the columns of `matrix` [I, I] into this order (int64 [I]), in place."""
    step = max(1, _ELEMENTS // max(1, len(matrix)))
    for start in range(0, len(matrix), step):
        columns = matrix[:, start : start + step]
        columns.copy_(columns.index_select(0, order))
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step]
        rows.copy_(rows.index_select(1, order))


def reverse_(matrix: Tensor) -> Tensor:
    """Turn the order of the rows and of the columns of `matrix` (contiguous) round, in place, and return it."""
    flat = matrix.view(-1)
    for first in range(0, len(flat) // 2, _ELEMENTS):
        size = min(_ELEMENTS, len(flat) // 2 - first)
        left, right = flat[first : first + size], flat[len(flat) - first - size : len(flat) - first]
        turned = left.flip(0)
        left.copy_(right.flip(0))
        right.copy_(turned)
    return matrix
