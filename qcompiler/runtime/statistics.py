"""Statistics that observers collect over calibration data: ranges, and a histogram where the range is to be clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompiler.ir.annotations import Observer
from qcompiler.numerics import fake_quantize, nvfp4_global_scale, static_qparams
from qcompiler.runtime.tokens import not_finite, real_tokens, unreached
from qcompiler.scheme import Strategy

_BINS = 2**16  # one for each number of 16 bits
_CHUNK = 2**20  # elements counted at once: what is made on the way stays in the cache
_SHRINKS = 80
_WIDTH = 2.0**-7  # of a bin of bfloat16, of its value: between half of this and this
_SURE = 2  # standard deviations by which a shrunken range must be better where bins leave its error in doubt


class Statistic:
    """The range of one observed tensor over all real tokens, per tensor or per head.

    `percentile` and `mse` also count how often each value occurred: exact where the model computes in bfloat16 or
    float16; others are rounded to bfloat16, within 0.4%. Updates commute, and two statistics could be added.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.tokens = 0
        self._per_head = observer.spec.strategy is Strategy.ATTN_HEAD
        self._low: Tensor | None = None  # [1] or [heads]
        self._high: Tensor | None = None
        self._counts: Tensor | None = None  # [1 or heads, _BINS], by the bits of the value
        self._dtype = torch.bfloat16  # whose bits they are
        self._exact = True

    def update(self, x: Tensor, mask: Tensor) -> None:
        """Take in `x` where `mask` (bool [B, S]) is true.

        `x` is [B, S, ...], [B * S, ...] or, for keys and values, [B, H, S, D].

        Raises `DataError` on NaN or infinity.
        """
        if not bool(mask.any()):
            return
        rows = self._rows(x, mask)
        low, high = (torch.stack(ends).float() for ends in zip(*(torch.aminmax(row) for row in rows), strict=True))
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise not_finite(self.observer.consumers)
        if not self._per_head:
            low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        self.tokens += int(mask.sum())
        if self.observer.kind != "minmax":
            self._count(rows)

    def _rows(self, x: Tensor, mask: Tensor) -> Sequence[Tensor]:
        """Real tokens, in any order: of each head where heads have ranges of their own. Views where none is padding."""
        if self.observer.purpose == "input":
            return [real_tokens(x, mask)]
        if not bool(mask.all()):
            x = x.transpose(1, 2)[mask.to(x.device)]
        elif self._per_head or not x.is_contiguous():
            x = x.transpose(1, 2)  # as projections make them: heads after tokens
        return x.unbind(-2) if self._per_head else [x]

    def _count(self, rows: Sequence[Tensor]) -> None:
        if self._counts is None:
            shape = (len(rows) if self._per_head else 1, _BINS)
            self._counts = torch.zeros(shape, dtype=torch.int64, device=rows[0].device)
            self._exact = rows[0].dtype in (torch.bfloat16, torch.float16)
            self._dtype = rows[0].dtype if self._exact else torch.bfloat16
        for index, row in enumerate(rows):
            counts = self._counts[index if self._per_head else 0]
            for part in torch.split(row.flatten(), _CHUNK):
                bits = part.to(self._dtype).view(torch.uint16)
                counts += torch.bincount(bits.to(torch.int32), minlength=_BINS)

    def range(self, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The range to quantize to, float32, a number or [heads]; zero lies in it.

        `mse` tries it with scales of `scale_dtype`. Raises `DataError` where no token ever came by.
        """
        if self._low is None or self._high is None:
            mend = "use more calibration data, or a scheme whose activations are quantized dynamically"
            raise unreached(self.observer.consumers, mend)
        low, high = self._low.clamp_max(0), self._high.clamp_min(0)
        if self.observer.kind == "percentile":
            low, high = self._percentiles(low, high)
        elif self.observer.kind == "mse":
            low, high = self._least_error(low, high, scale_dtype)
        return (low, high) if self._per_head else (low[0], high[0])

    def replace(self, low: Tensor, high: Tensor) -> None:
        """Become the statistic of a tensor with another range, of which nothing else is known."""
        assert self.observer.kind == "minmax", "a histogram cannot follow"
        self._low, self._high = low.reshape(-1), high.reshape(-1)

    def qparams(self, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Static scale ([1] or [heads, 1, 1], `scale_dtype`) and zero point (int8, asymmetric only)."""
        low, high = self.range(scale_dtype)
        if low.dim():
            low, high = low.reshape(-1, 1, 1), high.reshape(-1, 1, 1)
        return static_qparams(low, high, self.observer.spec, scale_dtype=scale_dtype)

    def global_scale(self) -> Tensor:
        """NVFP4's input global scale, float32 [1]."""
        low, high = self.range()
        return nvfp4_global_scale(torch.maximum(-low, high))

    def _values(self) -> tuple[Tensor, Tensor]:
        """The values that occurred, ascending (float32 [N]), and how often in each row (int64 [rows, N])."""
        assert self._counts is not None
        device = self._counts.device
        # The bits of negative values count down: ascending, they come first and the other way round.
        bits = torch.cat(
            [torch.arange(_BINS - 1, _BINS // 2 - 1, -1, device=device), torch.arange(_BINS // 2, device=device)]
        )
        bits = bits[self._counts[:, bits].any(0)]
        values = bits.to(torch.uint16).view(self._dtype).float()
        largest = torch.finfo(self._dtype).max  # what lies between it and float32's largest was rounded to infinity
        return values.clamp_(-largest, largest), self._counts[:, bits]

    def _percentiles(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest values with the given shares, of all in their row, at or below them."""
        values, counts = self._values()
        up_to = counts.cumsum(1).double()
        inside = up_to[:, -1:] * (self.observer.percentile / 100)
        first, last = (values[torch.searchsorted(up_to, share)[:, 0]] for share in (up_to[:, -1:] - inside, inside))
        return torch.maximum(low, first.clamp_max(0)), torch.minimum(high, last.clamp_min(0))

    def _least_error(self, low: Tensor, high: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of each row's range, shrunk step by step, the one with the least squared error over what occurred.

        Where a value is known to its bin alone, its error is known so far: what it may be off by is counted against a
        shrunken range, which so is not worse than the whole one on the values themselves.
        """
        spec = self.observer.spec
        values, counts = self._values()
        rows = values.expand(len(low), 1, -1)  # a cache's [heads, tokens, head size]
        best, least = torch.ones_like(low), torch.full_like(low, torch.inf, dtype=torch.float64)
        whole: Tensor | None = None
        for step in range(_SHRINKS):
            factor = 1 - step / _SHRINKS
            ends = [(end * factor).reshape(-1, 1, 1) for end in (low, high)]
            scale, zero = static_qparams(ends[0], ends[1], spec, scale_dtype=scale_dtype)
            off = (fake_quantize(rows, spec, scale=scale, zero_point=zero) - rows).double()[:, 0]
            error = (off.square() * counts).sum(1)
            if not self._exact:
                # The square changes by (2 off + moved) moved, with `moved` flat over the width of the bin.
                width = values.double().abs() * _WIDTH
                doubt = ((2 * off.abs() + width).mul_(width).square_() * counts).sum(1) / 12
                if whole is None:
                    whole = doubt
                else:
                    error += _SURE * (doubt + whole).sqrt()
            best = torch.where(error < least, factor, best)
            least = torch.minimum(error, least)
        return low * best, high * best
