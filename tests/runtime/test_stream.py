"""What waits between partitions, and what is computed once for all batches of a shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import qcompiler
from qcompiler.capture import capture_graph
from qcompiler.capture.compare import tensors_of
from qcompiler.data.batches import TokenBatch
from qcompiler.errors import LegalityError
from qcompiler.ir.partition import partitions
from qcompiler.runtime.shelf import Shelf
from qcompiler.runtime.stream import Stream, always
from tests.compile.tiny import INT4, compile_tiny, pipeline, rule, save_tiny, tiny_model

CPU = torch.device("cpu")


class Noted(Shelf):
    """A shelf that notes how many bytes each value that it was to keep holds."""

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        self.held: list[int] = []

    def put(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.held.append(value.untyped_storage().nbytes())
        return super().put(value)


@pytest.mark.parametrize(("model_type", "masks"), [("llama", 0), ("gemma3_text", 1)])
def test_of_masks_only_those_wait_that_are_not_causal_and_these_on_the_shelf(
    model_type: str, masks: int, tmp_path: Path
) -> None:
    model: Any = tiny_model(model_type, max_position_embeddings=512)
    graph = capture_graph(model)
    lengths = (300, 290, 280)
    batches = [TokenBatch(torch.ones(1, n, dtype=torch.int64), torch.ones(1, n, dtype=torch.bool)) for n in lengths]
    tensors = tensors_of(graph, model)
    first = partitions(graph)[0]
    with Noted(tmp_path / "output") as shelf:
        Stream(graph, partitions(graph), batches, CPU, shelf).run(first, first.nodes, tensors, always({}), keep=True)
    squares = [n * n for n in lengths]
    assert sorted(n for n in shelf.held if n in squares) == sorted(squares * masks)


@pytest.fixture
def positional(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Llama whose layers project the angles of positions, which are the same for all batches of a shape."""
    init, forward = modeling_llama.LlamaDecoderLayer.__init__, modeling_llama.LlamaDecoderLayer.forward

    def with_projection(self: Any, config: Any, layer_idx: int) -> None:
        init(self, config, layer_idx)
        self.position = nn.Linear(config.head_dim, config.hidden_size, bias=False)

    def project(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        cos, _ = kwargs["position_embeddings"]
        return forward(self, hidden_states + self.position(cos.to(hidden_states.dtype)), **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", with_projection)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", project)
    return save_tiny(tmp_path / "model", "llama")


ROUNDED = {**INT4, "input_activations": {"type": "int", "bits": 8, "strategy": "token", "dynamic": True}}


def test_a_linear_that_reads_the_shape_alone_is_observed_solved_and_rounded_as_others(
    positional: Path, tmp_path: Path
) -> None:
    rules = [
        rule({"name": "model.layers.0.position"}, ROUNDED, solver="gptq"),
        rule({"name": "model.layers.1.mlp.down_proj"}, INT4, solver="gptq"),
    ]
    result = compile_tiny(positional, tmp_path / "output", pipeline(*rules))
    error = result.report.row("model.layers.0.position").output_error
    assert error is not None
    assert error > 0
    assert qcompiler.verify(result.output).difference == 0


def test_a_statistic_for_linears_of_several_layers_is_refused(positional: Path, tmp_path: Path) -> None:
    rules = rule({"name": "model.layers.*.position"}, INT4, solver="gptq")
    says = r"model.layers.0.position and 1 more that share an input with it run in several partitions \(layer 0, layer"
    with pytest.raises(LegalityError, match=says):
        compile_tiny(positional, tmp_path / "output", pipeline(rules))
