"""Transform a partition before it is solved: choose each scale, fold it, and let the statistics follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qcompiler.ir.annotations import Quant, Rescale
from qcompiler.numerics import QuantizedTensor, multiplied_out, nvfp4_global_scale, weight_amax
from qcompiler.pipeline.base import PartitionWork
from qcompiler.runtime.channels import ChannelStatistic
from qcompiler.runtime.hessian import HessianStatistic
from qcompiler.runtime.parallel import in_parallel
from qcompiler.runtime.statistics import Statistic
from qcompiler.scheme import QuantSpec
from qcompiler.transforms.awq import search
from qcompiler.transforms.fold import fold, rescaled
from qcompiler.transforms.options import AwqOptions
from qcompiler.transforms.smoothquant import smoothing_scale

Nearest = Callable[[str, Tensor, Tensor | None], QuantizedTensor]
"""A linear's weight [O, I], by the linear's path, rounded to nearest; NVFP4's by this global scale."""


@dataclass(frozen=True, slots=True)
class Transformed:
    """What came of one `Rescale`. `ratio`: AWQ's exponent, None where no scale is best (or none is searched).

    `before` and `error`: squared output errors of rounding to nearest without and with the scale, summed over `asked`;
    None where the transform does not look at them.
    """

    rescale: Rescale
    ratio: float | None = None
    before: float | None = None
    error: float | None = None

    @property
    def gain(self) -> float | None:
        """`error` as a share of `before`: 1 where the scale changes nothing."""
        return self.error / self.before if self.error is not None and self.before else None


@dataclass(frozen=True, slots=True)
class Measured:
    """The statistics of a partition, by the path of the linear that uses them."""

    ranges: Mapping[str, Statistic]
    hessians: Mapping[str, HessianStatistic]
    channels: Mapping[str, ChannelStatistic]


def transform(
    rescale: Rescale,
    work: PartitionWork,
    quants: Mapping[str, Quant],
    measured: Measured,
    nearest: Nearest,
    *,
    fused: Mapping[str, Sequence[str]],
) -> Transformed:
    """Choose the scale of one site and fold it into `work.weights`; `measured` becomes what it is of rescaled inputs.

    `quants` are those of the linears in `rescale.asked`; `fused`: of linears that share NVFP4's global scale, by path,
    all that share it. Raises `DataError` where inputs are not finite, or none came by.
    """

    def rounded(which: int, weight: Tensor, scale: Tensor) -> Tensor:
        path = rescale.asked[which]
        shared = {f"{other}.weight": work.weights[f"{other}.weight"] for other in fused.get(path, ())}
        shared |= {name: rescaled(shared[name], scale) for name in rescale.weights if name in shared}
        amaxes = [weight_amax(member) for member in shared.values()]
        global_scale = nvfp4_global_scale(torch.stack(amaxes).max()) if amaxes else None
        return multiplied_out(nearest(path, weight, global_scale))

    weights = [work.weights[f"{path}.weight"] for path in rescale.asked]
    channel = measured.channels[rescale.asked[0]]
    ties = rescale.channels.to(weights[0].device) if rescale.tied else None
    if isinstance(rescale.transform, AwqOptions):
        choice = search(
            weights,
            channel.mean_abs(),
            measured.hessians[rescale.asked[0]].value(),
            rounded,
            rescale.transform,
            specs=[_weights_of(quants[path]) for path in rescale.asked],
            ties=ties,
            each=partial(in_parallel, workers=work.workers),
        )
        scale, ratio = choice.scale, choice.candidate.ratio if choice.candidate else None
        result = Transformed(rescale, ratio, choice.before, choice.error)
        if choice.candidate is None:
            return result
    else:
        readers = [work.weights[name] for name in rescale.weights]
        scale, result = smoothing_scale(readers, channel.amax(), rescale.transform, ties=ties), Transformed(rescale)
    fold(rescale, scale, work.weights)
    work.altered.update((*(gain.name for gain in rescale.gains), *rescale.weights))
    _follow(rescale, scale, measured)
    return result


def _weights_of(quant: Quant) -> QuantSpec:
    assert quant.scheme is not None
    return quant.scheme.weights


def _follow(rescale: Rescale, scale: Tensor, measured: Measured) -> None:
    """Linears may share a statistic: each follows once. The range of a whole tensor follows from its channels'."""
    found = [
        s for by_path in (measured.hessians, measured.channels) for p in rescale.consumers if (s := by_path.get(p))
    ]
    for statistic in dict.fromkeys(found):
        statistic.rescale(scale)
    for path in rescale.consumers:
        if path in measured.ranges:
            low, high = measured.channels[path].range()
            measured.ranges[path].replace(low.amin(), high.amax())
