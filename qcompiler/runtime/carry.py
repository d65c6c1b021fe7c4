"""What one sweep leaves to the next: solved weights and transformed parameters, a file per partition on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qcompiler.checkpoints.output import SWEPT, SweepFolder, writing_to
from qcompiler.checkpoints.writer import write_safetensors
from qcompiler.numerics import QuantizedTensor
from qcompiler.pipeline.base import Solved
from qcompiler.scheme import QuantSpec

_WEIGHT = tuple(f.name for f in fields(QuantizedTensor) if f.name not in ("spec", "shape"))
_INPUT = tuple(f.name for f in fields(Solved) if f.name != "weight")


@dataclass(frozen=True, slots=True)
class Carried:
    """What earlier sweeps did to one partition: linears that are solved, and parameters that transforms replaced."""

    solved: Mapping[str, Solved] = field(default_factory=dict)
    altered: Mapping[str, Tensor] = field(default_factory=dict)


class Carry:
    """Keeps what a sweep made of each partition for the sweeps after it, in a `SweepFolder` beside `output`.

    Close it: the folder goes with it. Raises `CheckpointError` where it cannot write.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        with writing_to(output):
            self._folder = SweepFolder(output)
        self._specs: dict[str, dict[str, QuantSpec]] = {}

    def keep(self, partition: str, solved: Mapping[str, Solved], altered: Mapping[str, Tensor]) -> None:
        """Keep all that is known of a partition, in place of what was kept of it before."""
        tensors = {f"altered:{path}": tensor for path, tensor in altered.items()}
        for path, linear in solved.items():
            parts = {name: getattr(linear.weight, name) for name in _WEIGHT}
            parts |= {name: getattr(linear, name) for name in _INPUT}
            tensors |= {f"{name}:{path}": tensor for name, tensor in parts.items() if tensor is not None}
        self._specs[partition] = {path: linear.weight.spec for path, linear in solved.items()}
        file = self._file(partition)
        fresh = file.with_suffix(".new")  # what was kept before may be mapped into memory still
        with writing_to(self._output, sum(tensor.nbytes for tensor in tensors.values())):
            write_safetensors(fresh, tensors)
            fresh.replace(file)

    def of(self, partition: str, device: torch.device) -> Carried:
        """What is kept of a partition, on `device`; nothing before the first sweep went through it."""
        if partition not in self._specs:
            return Carried()
        with safe_open(self._file(partition), "pt") as kept:
            tensors = {name: kept.get_tensor(name).to(device) for name in kept.keys()}  # noqa: SIM118  no mapping
        solved = {path: _solved(tensors, path, spec) for path, spec in self._specs[partition].items()}
        altered = {name.partition(":")[2]: t for name, t in tensors.items() if name.startswith("altered:")}
        return Carried(solved, altered)

    def close(self) -> None:
        """Delete the folder."""
        self._folder.close()

    def _file(self, partition: str) -> Path:
        return self._folder.path / f"{SWEPT}{partition.replace(' ', '-')}.safetensors"


def _solved(tensors: Mapping[str, Tensor], path: str, spec: QuantSpec) -> Solved:
    parts = {name: tensors.get(f"{name}:{path}") for name in (*_WEIGHT, *_INPUT)}
    codes, scale = parts.pop("codes"), parts.pop("scale")
    assert codes is not None
    assert scale is not None
    inputs = {name: parts.pop(name) for name in _INPUT}
    shape = (codes.shape[0], codes.shape[1])
    return Solved(QuantizedTensor(spec, shape, codes, scale, **parts), **inputs)
