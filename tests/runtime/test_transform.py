"""What a transform is searched with is what linears are solved with."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qcompiler.ir.annotations import ChannelObserver, Gain, HessianObserver, Quant, Rescale
from qcompiler.ir.graph import Partition
from qcompiler.numerics import QuantizedTensor, nvfp4_global_scale, quantize_weight
from qcompiler.pipeline.base import PartitionWork
from qcompiler.runtime.channels import ChannelStatistic
from qcompiler.runtime.hessian import HessianStatistic
from qcompiler.runtime.parallel import Workers
from qcompiler.runtime.transform import Measured, transform
from qcompiler.scheme import preset
from qcompiler.transforms.options import AwqOptions

GATE, UP, OTHER = "mlp.gate_proj", "mlp.up_proj", "fc1"
READERS = (GATE, UP, OTHER)


def test_the_search_rounds_by_the_global_scale_that_fused_linears_will_share() -> None:
    """Of three that read one tensor, two are fused; the first of them is by far the smaller."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 64, 32, generator=generator) * torch.randn(32, generator=generator).exp()
    before = {
        f"{path}.weight": torch.randn(16, 32, generator=generator).mul(size).bfloat16()
        for path, size in zip(READERS, (0.001, 1.0, 0.1), strict=True)
    }
    hessian = HessianStatistic(HessianObserver("hessian", READERS, ("test",)))
    channels = ChannelStatistic(ChannelObserver("channels", READERS, ("test",)))
    for statistic in (hessian, channels):
        statistic.update(inputs, torch.ones(1, 64, dtype=torch.bool))
    gain, names = Gain("norm.weight"), tuple(before)
    rescale = Rescale(
        "norm", "norm", "norm", AwqOptions(grid=4), READERS, READERS, torch.arange(32), False, (gain,), names, ("test",)
    )
    scheme = preset("NVFP4A16")
    asked: list[tuple[str, Tensor, Tensor | None]] = []

    def nearest(path: str, weight: Tensor, global_scale: Tensor | None) -> QuantizedTensor:
        asked.append((path, weight, global_scale))
        return quantize_weight(weight, scheme.weights, scale_dtype=torch.bfloat16, global_scale=global_scale)

    part = Partition("layer 0", 0, (), (), ())
    work = PartitionWork(
        part,
        part,
        {**before, "norm.weight": torch.ones(32).bfloat16()},
        Workers(torch.device("cpu")),
    )  # type: ignore[arg-type]
    done = transform(
        rescale,
        work,
        {path: Quant(scheme, "rtn", ("test",), transform=rescale.transform) for path in READERS},
        Measured({}, dict.fromkeys(READERS, hessian), dict.fromkeys(READERS, channels)),
        nearest,
        fused={GATE: (GATE, UP), UP: (GATE, UP), OTHER: (OTHER,)},
    )
    assert done.ratio is not None
    largest = {path: [float(w.abs().max()) for p, w, _ in asked if p == path] for path in READERS}
    assert max(largest[GATE]) < min(largest[UP])
    for (path, scaled, found), (_, partner, its) in pairwise(asked):
        assert found is not None
        if path == GATE:  # its partner comes next, under the same scale
            assert its is not None
            assert float(found) == float(its) == pytest.approx(float(nvfp4_global_scale(partner.abs().max())))
        if path == OTHER:
            assert float(found) == pytest.approx(float(nvfp4_global_scale(scaled.abs().max())))
