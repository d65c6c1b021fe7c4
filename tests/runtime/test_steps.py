"""What passes of one's own see and do beside calibrate, in one sweep."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from qcompiler.ir.graph import Graph, Stage
from qcompiler.pipeline import Context, PartitionStep, PartitionWork, Pass, Pipeline, StreamingPass
from qcompiler.runtime import executor
from tests.compile.tiny import EVERYWHERE, INT4, compile_tiny, pipeline, rule, save_tiny, stored


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


def beside(work_on: Callable[[PartitionWork], None]) -> StreamingPass:
    """A streaming pass that does this to every partition."""

    @dataclass
    class Step(PartitionStep):
        def partition(self, work: PartitionWork) -> None:
            work_on(work)

    @dataclass(frozen=True)
    class Beside(StreamingPass):
        name: ClassVar[str] = "beside"
        requires: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED, Stage.CALIBRATED})

        def begin(self, graph: Graph, context: Context) -> PartitionStep:
            return Step()

    return Beside()


def around(calibrate: int, *items: Pass) -> Pipeline:
    """GPTQ everywhere, with `items` before calibrate (0) or after it (1)."""
    passes = list(pipeline(rule(EVERYWHERE, INT4, solver="gptq")).flat())
    at = next(index for index, item in enumerate(passes) if item.name == "calibrate") + calibrate
    return Pipeline("around", (*passes[:at], *items, *passes[at:]))


def test_what_a_step_before_does_to_weights_is_what_is_solved(llama: Path, tmp_path: Path) -> None:
    def zero(work: PartitionWork) -> None:
        for path in [path for path in work.weights if path.endswith("v_proj.weight")]:
            work.weights[path] = torch.zeros_like(work.weights[path])

    result = compile_tiny(llama, tmp_path / "output", around(0, beside(zero)))
    codes = {key: tensor for key, tensor in stored(result.output).items() if key.endswith("v_proj.weight_packed")}
    assert len(codes) == 2
    assert all(len(tensor.unique()) == 1 for tensor in codes.values())


@pytest.mark.parametrize("way", ["file", "memory"])
def test_steps_after_see_the_weights_of_every_layer_as_they_were(
    way: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "memory":
        monkeypatch.setattr(executor, "shelf_for", lambda context: nullcontext())
    seen: dict[str, Tensor] = {}

    def see(work: PartitionWork) -> None:
        seen.update((path, work.weights[path]) for path in list(work.weights) if path.endswith("_proj.weight"))

    compile_tiny(llama, tmp_path / "output", around(1, beside(see)))
    dense = stored(llama)
    assert len(seen) == 14
    assert all(torch.equal(tensor, dense[path]) for path, tensor in seen.items())
