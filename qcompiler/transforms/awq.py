"""AWQ (Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration").

Input channels with large activations get a scale before the weight is rounded, which makes their relative error
smaller: W X becomes Q(W s) (X / s). The scale is s = (mean |X|)^r, or with `duo_scaling` (as AutoAWQ and llm-compressor
have it) (mean |X|)^r / (mean |W|)^(1 - r), and r is searched for the least error of the output.

The peers measure that error by running the block again for each r. For the linears' own outputs it needs no run:
||(W - Q(W s) / s) X||^2 is a quadratic form in the Hessian X^T X, exact over all tokens. What differs from
llm-compressor's search, then, is that errors are those of each linear's output and not of the block's (after attention
or the MLP's product), and that a channel that is always zero keeps a scale of 1 and takes no part in normalization.

Where rows of a weight are rounded apart from one another, the largest quarter of them, which makes most of the error,
tells which points of the grid can be best; those few, and no scale, are then compared on all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qcompiler.numerics import QuadraticForm, weight_amax
from qcompiler.numerics.tensor import pieces
from qcompiler.scheme import QuantSpec, Strategy
from qcompiler.transforms.fold import rescaled
from qcompiler.transforms.options import AwqOptions
from qcompiler.transforms.ties import channel_mean, to_features

_SMALLEST = 1e-4  # of a scale before it is normalized, and added to the weights' part: as in AutoAWQ
# Elements that are scaled, rounded and compared at once on a CPU. Temporaries of this size stay in its cache, and the
# allocator gives the same memory again; those several times as large take twice the time.
_ELEMENTS = 2**19
_ROWS = 1024  # that are multiplied by the Hessian at once
_APART = frozenset({Strategy.CHANNEL, Strategy.GROUP})
"""Strategies where a row is rounded as it would be without the others."""
_SAMPLED = 4
_MANY_ROWS = 512
_FINALISTS = 3

Quantize = Callable[[int, Tensor, Tensor], Tensor]
"""(which weight, rows of it scaled [R, I], the scale [I]) to these rows, rounded: float32 or the weight's dtype.

All rows come at once, unless rows are rounded apart from one another.
"""

Each = Callable[[Callable[[Tensor], float], Sequence[Tensor]], list[float]]
"""Computes the error of each of some scales, side by side or in turn."""


def _in_turn(error: Callable[[Tensor], float], scales: Sequence[Tensor]) -> list[float]:
    return [error(scale) for scale in scales]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point of the grid: the exponent, and whether weights enter the scale."""

    ratio: float
    duo: bool


@dataclass(frozen=True, slots=True)
class AwqChoice:
    """The best scale (float32 [I]), where it lies on the grid (None: no scale), its squared error, and that of none."""

    scale: Tensor
    candidate: Candidate | None
    error: float
    before: float


def search(
    weights: Sequence[Tensor],
    mean_abs: Tensor,
    hessian: Tensor,
    quantize: Quantize,
    options: AwqOptions,
    *,
    specs: Sequence[QuantSpec],
    ties: Tensor | None = None,
    each: Each = _in_turn,
) -> AwqChoice:
    """The scale of the grid under which the rounded `weights` (each [O_k, I]) change the outputs least.

    The error is the sum over weights of tr(D H D^T), D = W - Q(W s) / s; that of no scale is among those compared, so
    the choice is never worse. Of bfloat16 weights, D is multiplied in bfloat16 (see `QuadraticForm`). `mean_abs`
    float32 [I] is mean |X_j|, `hessian` float32 [I, I] is X^T X, `specs` are what the weights are rounded to, and
    channels of equal `ties` (int64 [I]) get one scale. A weight is scaled in float32 and rounded to its dtype once, as
    it will be when the scale is folded. `each` may compute errors side by side: they do not depend on one another.
    """
    activations = channel_mean(mean_abs.float(), ties)
    magnitudes = channel_mean(normalized_mean(weights, specs), ties) if options.duo_scaling else None
    form = QuadraticForm(hessian, weights[0].dtype)
    whole = _Errors(weights, specs, form, quantize)
    if not whole.apart:
        each = _in_turn  # a whole weight in float32 at a time, and not one for each thread
    candidates = [
        (candidate, to_features(_scale(candidate, activations, magnitudes), ties)) for candidate in _candidates(options)
    ]
    if whole.apart and sum(map(len, weights)) >= _MANY_ROWS:
        some = _Errors([_largest_rows(weight) for weight in weights], specs, form, quantize)
        errors = each(some.of, [scale for _, scale in candidates])
        nearest = sorted(range(len(candidates)), key=errors.__getitem__)[:_FINALISTS]
        candidates = [candidates[index] for index in nearest]
    unscaled = torch.ones_like(mean_abs, dtype=torch.float32)
    before, *errors = each(whole.of, [unscaled, *(scale for _, scale in candidates[:1])])
    limit = min(before, *errors)  # the first is likely the best: of the others, most are seen to be worse halfway
    errors += each(partial(whole.of, limit=limit), [scale for _, scale in candidates[1:]])
    least = min(range(len(errors)), key=errors.__getitem__, default=None)
    if least is None or errors[least] >= before:
        return AwqChoice(unscaled, None, before, before)
    candidate, scale = candidates[least]
    return AwqChoice(scale, candidate, errors[least], before)


def _largest_rows(weight: Tensor) -> Tensor:
    """A quarter of the rows of a weight [O, I]: those of largest norm, in their order."""
    norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    largest = torch.argsort(norms, descending=True, stable=True)[: -(-len(weight) // _SAMPLED)]
    return weight.index_select(0, largest.sort().values)


def normalized_mean(weights: Sequence[Tensor], specs: Sequence[QuantSpec]) -> Tensor:
    """Per input channel, the mean over all rows of |w| / max |w| of the elements that share its scale: float32 [I]."""
    total = torch.zeros(weights[0].shape[1], dtype=torch.float64, device=weights[0].device)
    for weight, spec in zip(weights, specs, strict=True):
        whole = weight_amax(weight) if spec.strategy is Strategy.TENSOR else None
        for piece in pieces(spec, (weight.shape[0], weight.shape[1]), weight.device):
            values = piece.elements(weight).float().abs()  # not in place: the elements of float32 are a view
            values /= (values.amax((1, 3), keepdim=True) if whole is None else whole) + 1e-6
            total[piece.columns] += values.flatten(2).sum((0, 1)).double()
    return (total / sum(len(weight) for weight in weights)).float()


def _candidates(options: AwqOptions) -> list[Candidate]:
    """The grid without the point that is no scale, which llm-compressor counts as one of its points too.

    From the middle of the range outwards: a good one early shows the others to be worse before they are all computed.
    """
    with_weights = options.grid // 2 if options.duo_scaling == "both" else options.duo_scaling * (options.grid - 1)
    points = {False: options.grid - with_weights, True: with_weights}
    grid = [Candidate(i / max(count - 1, 1), duo) for duo, count in points.items() for i in range(count) if duo or i]
    return sorted(grid, key=lambda candidate: (abs(candidate.ratio - 0.5), candidate.ratio, candidate.duo))


def _scale(candidate: Candidate, activations: Tensor, magnitudes: Tensor | None) -> Tensor:
    """A candidate's scale of each channel [C], of its mean activation and weight."""
    scale = activations.pow(candidate.ratio)
    if candidate.duo:
        assert magnitudes is not None
        scale = scale / (magnitudes.pow(1 - candidate.ratio) + _SMALLEST)
    scale.clamp_(min=_SMALLEST)
    alive = activations > 0
    if not bool(alive.any()):
        return torch.ones_like(scale)
    low, high = scale[alive].aminmax()
    return torch.where(alive, scale / (low * high).sqrt(), 1.0)


class _Errors:
    """Squared output errors of weights under a scale: see `search`."""

    def __init__(
        self, weights: Sequence[Tensor], specs: Sequence[QuantSpec], form: QuadraticForm, quantize: Quantize
    ) -> None:
        self._weights = weights
        self._form = form
        self._quantize = quantize
        self.apart = all(spec.strategy in _APART for spec in specs)

    def of(self, scale: Tensor, limit: float = float("inf")) -> float:
        """The error under `scale` (float32 [I]); from `limit` on, some number that is not below it."""
        total = 0.0
        for which, weight in enumerate(self._weights):
            rows = len(weight)
            if self.apart and weight.device.type == "cpu":
                rows = max(16, _ELEMENTS // weight.shape[1])
            for part in torch.split(weight, rows):
                scaled = rescaled(part, scale)
                if scaled.dtype is torch.float16 and not bool(scaled.isfinite().all()):
                    return float("inf")  # what overflows is no scale for these weights
                difference = self._quantize(which, scaled, scale).float().div_(scale).sub_(part)
                for some in torch.split(difference, _ROWS):
                    total += self._form.of(some.to(self._form.dtype))
                    if total >= limit:
                        return total
        return total
