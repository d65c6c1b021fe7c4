"""Capturing a model: what is raised, what is refused, what is proved, and that nothing stays behind."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.fx import config as fx_config
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from qcompiler.capture import capture_and_prove, capture_graph
from qcompiler.capture.calls import undecorated
from qcompiler.capture.compare import NotTheModelError, compare_logits, compare_with_eager, has_copies
from qcompiler.capture.twin import build_twin
from qcompiler.errors import CaptureError
from qcompiler.ir.annotations import LeafKind
from qcompiler.ir.fx import op_name
from qcompiler.ir.graph import Graph
from tests.capture.models import captured, on_meta
from tests.zoo import tiny_config


def kinds(graph: Graph) -> dict[str, LeafKind]:
    return {leaf.path: leaf.kind for _, leaf in graph.leaves()}


# --- raising ----------------------------------------------------------------------------------------------------------


def test_a_subclass_with_its_own_forward_stays_as_traced() -> None:
    graph = captured("opt")  # its positional embedding adds an offset
    positions = "model.decoder.embed_positions"
    assert positions not in kinds(graph)
    assert kinds(graph)["model.decoder.embed_tokens"] is LeafKind.EMBEDDING
    assert any(node.op == "get_attr" and node.target == f"{positions}.weight" for node in graph.nodes)


def test_a_linear_that_is_spelled_out_is_raised() -> None:
    linear = captured("falcon").model.get_submodule("transformer.h.0.mlp.dense_h_to_4h")
    assert type(linear).forward is not nn.Linear.forward
    assert kinds(captured("falcon"))["transformer.h.0.mlp.dense_h_to_4h"] is LeafKind.LINEAR


def test_norms_are_raised_by_what_they_compute() -> None:
    found = kinds(captured("cohere2"))
    assert type(captured("cohere2").model.get_submodule("model.norm")).__name__ == "Cohere2LayerNorm"
    assert found["model.norm"] is LeafKind.NORM


def test_gpt2_has_transposed_linears_with_the_sizes_of_the_linears_they_compute() -> None:
    leaves = {leaf.path: leaf for _, leaf in captured("gpt2").leaves()}
    fc = leaves["transformer.h.0.mlp.c_fc"]
    hidden = captured("gpt2").model.config.hidden_size
    assert (fc.kind, fc.in_features, fc.out_features, fc.bias) == (LeafKind.CONV1D, hidden, 4 * hidden, True)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "dbrx", "longcat_flash"])
def test_a_block_of_experts_is_one_node(model_type: str) -> None:
    graph = captured(model_type)
    blocks = [leaf for _, leaf in graph.leaves() if leaf.kind is LeafKind.EXPERTS]
    assert blocks
    for leaf in blocks:
        assert leaf.parameters == sum(p.numel() for p in graph.model.get_submodule(leaf.path).parameters())
    assert not any(op_name(node).startswith("qcompiler.") for node in graph.nodes)


def test_the_graph_has_no_dropout_no_assertions_and_no_idle_casts() -> None:
    for node in captured("gpt2").nodes:
        assert op_name(node) not in ("aten.dropout", "aten.detach", "aten._assert_tensor_metadata")
        if op_name(node) == "aten.to":
            assert node.args[0].meta["val"].dtype != node.meta["val"].dtype  # type: ignore[union-attr]


def test_a_write_that_cannot_be_followed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        y.view(torch.int16).add_(1)
        return y

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    says = "aten.add_ in model.layers.0.mlp writes in place into what is read elsewhere, and that cannot be followed"
    with pytest.raises(CaptureError, match=says):
        capture_graph(on_meta("llama"))


def test_a_count_of_calls_that_nothing_reads_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    init = LlamaMLP.__init__

    def with_count(self: Any, config: Any) -> None:
        init(self, config)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        parts = torch.split(x, [1, x.shape[1] - 1], dim=1)
        x = x + 0
        first, others = torch.split(x, [1, x.shape[1] - 1], dim=1)
        others.add_(parts[0])
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y + first

    monkeypatch.setattr(LlamaMLP, "__init__", with_count)
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    graph, *_ = capture_and_prove(on_meta("llama"))
    assert not any("calls" in str(node.target) for node in graph.nodes)


def test_the_order_is_that_of_the_graph_and_not_of_a_set_in_the_model() -> None:
    # Gemma 3 computes rotary angles for each of the set of its kinds of layer.
    code = (
        "from qcompiler.ir.printer import print_graph\nfrom tests.capture.models import captured\n"
        "print(print_graph(captured('gemma3_text')))"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")  # the set's orders are two
    )
    assert first == second


def test_12_layers_have_the_leaves_of_a_full_trace_in_the_same_order() -> None:
    model = on_meta("llama", num_hidden_layers=12, layer_types=None)
    copied, full = (capture_graph(model, repeat=repeat) for repeat in (True, False))
    assert len(copied.like) == 12
    assert set(copied.like.values()) == {"model.layers.0"}
    assert [leaf for _, leaf in copied.leaves()] == [leaf for _, leaf in full.leaves()]
    assert [op_name(n) for n in copied.nodes if n.op == "call_function"] == [
        op_name(n) for n in full.nodes if n.op == "call_function"
    ]


# --- nothing stays behind ---------------------------------------------------------------------------------------------


def traces(model: PreTrainedModel) -> list[tuple[Any, ...]]:
    """What capture could have left on a model: classes, attributes, hooks, tensors and configs."""
    return [
        (
            path,
            type(module),
            sorted(vars(module)),
            [len(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")],
            [id(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())],
            getattr(module, "rope_type", None),
        )
        for path, module in model.named_modules()
    ] + [(dict(ALL_EXPERTS_FUNCTIONS), model.config.to_dict(), *_settings())]


def _settings() -> tuple[object, ...]:
    """What belongs to the process, and is set for the time of a trace."""
    return logging.root.manager.disable, dict(vars(fx_config)), dynamo_config.get_config_copy(), gc.isenabled()


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "openai-gpt", "aria_text", "cpmant"])
def test_a_model_is_what_it_was_after_capture_succeeded_or_failed(model_type: str, capfd: Any) -> None:
    model = on_meta(model_type)
    before = traces(model)
    failed = False
    try:
        capture_graph(model)
    except CaptureError:
        failed = True
    assert failed is (model_type in ("aria_text", "cpmant"))
    assert traces(model) == before
    assert capfd.readouterr().err == ""  # torch prints what it traced of a model that it cannot trace


def test_a_model_that_does_not_run_at_all_is_told_from_one_that_does_not_trace(capfd: Any) -> None:
    """Its heads do not fit one another: no rewriting of Python mends that."""
    model = on_meta("llama", num_key_value_heads=3)
    with pytest.raises(CaptureError) as raised:
        capture_graph(model)
    assert raised.value.message.startswith(
        "LlamaForCausalLM cannot be captured, and fails on sequences of one length too: RuntimeError: "
    )
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("run it in Transformers: where that fails too, mend its config; where not, ")
    assert capfd.readouterr().err == ""
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_that_runs_but_does_not_trace_is_told_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: LlamaMLP, x: Tensor) -> Tensor:
        x = self.down_proj(self.gate_proj(x))
        if isinstance(x.shape[1], torch.SymInt):
            raise TypeError("length is symbolic")
        return x

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(CaptureError) as raised:
        capture_graph(on_meta("llama"))
    assert raised.value.message == "LlamaForCausalLM cannot be captured: TypeError: length is symbolic"
    assert "no data-dependent or length-dependent Python" in (raised.value.hint or "")


# --- long contexts ----------------------------------------------------------------------------------------------------


def test_forwards_are_traced_without_the_no_grad_of_their_own() -> None:
    model = on_meta("llama")
    before = {module: type(module) for module in model.modules()}
    rope, layer = model.model.rotary_emb, model.model.layers[0]
    with torch.no_grad(), undecorated(model):
        assert type(rope).forward is before[rope].forward.__wrapped__
        assert type(layer) is before[layer]
    assert {module: type(module) for module in model.modules()} == before


def test_other_decorators_are_traced() -> None:
    class Graded(nn.Module):
        @torch.enable_grad()
        def forward(self, x: Tensor) -> Tensor:
            return x

    with torch.no_grad(), undecorated(graded := Graded()):
        assert type(graded) is Graded


def test_a_frozen_rope_bounds_the_sequences_and_is_put_back() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    }
    config = tiny_config("llama")
    config.rope_parameters = rope
    config.max_position_embeddings = 256
    twin = build_twin(config)
    before = twin.model.rotary_emb.rope_type
    graph = capture_graph(twin)
    compare_logits(graph, twin)
    assert graph.max_sequence_length == 64
    assert twin.model.rotary_emb.rope_type == before == "longrope"


def test_a_branch_on_the_length_bounds_the_sequences() -> None:
    assert capture_graph(on_meta("doge", keep_window_size=2048)).max_sequence_length == 2048
    assert captured("llama").max_sequence_length is None


# --- proof ------------------------------------------------------------------------------------------------------------


def test_a_layer_that_depends_on_its_index_is_traced_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaDecoderLayer.forward

    def scaled(self: LlamaDecoderLayer, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = forward(self, hidden_states, *args, **kwargs)
        return result * float(1 + self.self_attn.layer_idx)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled)
    model = on_meta("llama")
    wrong = capture_graph(model)
    assert has_copies(wrong)
    with pytest.raises(NotTheModelError, match="does not compute what the model computes"):
        compare_with_eager(wrong)
    graph, notes = capture_and_prove(model)
    assert not has_copies(graph)
    assert len(notes) == 1
    assert "every layer was traced" in notes[0]


def test_gpt2s_scaling_by_layer_index_makes_every_layer_a_kind_of_its_own() -> None:
    graph, notes = capture_and_prove(on_meta("gpt2", scale_attn_by_inverse_layer_idx=True))
    assert notes == []
    assert not has_copies(graph)


def mistake(graph: Graph) -> None:
    """Make the graph compute something else than the model, of the same operations: a gate times itself."""
    gate = next(node for node in graph.nodes if op_name(node) == "aten.silu")
    (product,) = gate.users
    product.args = (gate, gate)


def test_a_small_model_is_compared_itself() -> None:
    graph = capture_graph(on_meta("llama", layers=3, intermediate_size=1000))
    compare_with_eager(graph)
    mistake(graph)
    with pytest.raises(NotTheModelError):
        compare_with_eager(graph)


@pytest.mark.parametrize("said", [{"sliding_window": 4096}, {"vocab_size": 400_000}], ids=["window", "size"])
def test_a_model_that_no_short_run_shows_is_compared_through_its_twin(said: dict[str, int]) -> None:
    graph = capture_graph(on_meta("mistral", **said))
    mistake(graph)
    compare_with_eager(graph)  # the twin is captured anew, without the mistake


def test_a_loaded_model_is_compared_itself() -> None:
    twin = build_twin(tiny_config("llama"))
    graph, notes = capture_and_prove(twin)
    assert notes == []
    mistake(graph)
    with pytest.raises(NotTheModelError):
        compare_with_eager(graph)


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    with pytest.raises(CaptureError, match="is not causal"):
        capture_and_prove(on_meta("bert", is_decoder=False))


def test_buffers_of_a_model_on_meta_are_those_of_a_loaded_one() -> None:
    twin = build_twin(tiny_config("gemma3_text"))
    persistent = set(twin.state_dict())
    expected = {name: buffer for name, buffer in twin.named_buffers() if name not in persistent}
    buffers = captured("gemma3_text").buffers
    assert expected
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[name], expected[name]) for name in expected)


def test_a_buffer_that_nothing_sets_is_an_error() -> None:
    model = on_meta("llama")
    model.model.register_buffer("mystery", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(CaptureError, match=r"buffer model\.mystery is in no checkpoint"):
        capture_graph(model)
