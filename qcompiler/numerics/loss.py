"""What a scale search minimizes: an error of each tile, that is, of all elements that share a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompiler.numerics.tensor import Piece


class Loss:
    """The squared error of a weight's elements, as it is, by how large each input is, or as the output has it.

    `importance` is None, [I] (a weight per column), or [I, I] (a Hessian, of which the tiles' diagonal blocks count).
    """

    def __init__(self, importance: Tensor | None) -> None:
        self._hessian = importance if importance is not None and importance.ndim == 2 else None
        self._roots = importance.sqrt() if importance is not None and importance.ndim == 1 else None
        self._blocks: tuple[slice, Tensor] | None = None

    def per_tile(self, piece: Piece, error: Tensor) -> Tensor:
        """The loss [tiles down, 1, tiles across, 1] of a piece's errors (as `Piece.elements`); overwrites them."""
        if self._hessian is not None:
            return self._quadratic(piece, error, self._hessian)
        if self._roots is not None:
            error.mul_(self._roots[piece.columns].view(error.shape[2:]))
        # Two norms of one dimension each: on CPU one over two dimensions is not vectorized.
        norms: Tensor = torch.linalg.vector_norm(error, dim=3, keepdim=True)
        norms = torch.linalg.vector_norm(norms, dim=1, keepdim=True)
        return norms.square_()

    def _quadratic(self, piece: Piece, error: Tensor, hessian: Tensor) -> Tensor:
        down, rows, across, width = error.shape
        if self._blocks is None or self._blocks[0] != piece.columns:
            square = hessian[piece.columns].view(across, width, -1)[:, :, piece.columns]
            blocks = square.view(across, width, across, width).diagonal(dim1=0, dim2=2)
            self._blocks = piece.columns, blocks.permute(2, 0, 1).contiguous()
        by_block = error.permute(2, 0, 1, 3).reshape(across, down * rows, width)
        loss = torch.bmm(by_block, self._blocks[1]).mul_(by_block).sum(2)
        return loss.view(across, down, rows).sum(2).t()[:, None, :, None]
