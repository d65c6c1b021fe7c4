"""Legalize: what a target refuses before a weight is read, what stays dense instead, and for whom the config is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import qcompiler
from qcompiler.capture import capture_graph
from qcompiler.emit.config import LOADERS
from qcompiler.errors import ConfigError, LegalityError
from qcompiler.ir.annotations import Quant, get_quant, set_quant
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.printer import print_leaves
from qcompiler.lowering.predict import predict
from qcompiler.scheme import preset
from qcompiler.targets import load_target
from tests.capture.models import on_meta
from tests.conftest import Golden
from tests.passes.conftest import Saved
from tests.passes.models import Item, assign, block, pipeline, rule, run

LAYER = "model.layers.0"
GROUPS_OF_32 = {"weights": {"type": "int", "bits": 4, "group_size": 32}}
ATTENTION = ["attention-input", "attention-output"]
NO_FILES = ("info", "no weight files: names on disk were not checked")


def refusal(
    model: Graph | str, *passes: Item, target: str | None = None, folder: Path = Path("no files")
) -> LegalityError:
    with pytest.raises(LegalityError) as error:
        run(model, *passes, target=target, folder=folder)
    return error.value


# --- what the target refuses ------------------------------------------------------------------------------------------


def test_a_violation_names_layer_scheme_target_rule_and_mend() -> None:
    error = refusal(block(), assign(rule("W4AFP8", structure="mlp-output")), {"legalize": {"target": "vllm-sm80"}})
    assert error.message.split("\n") == [
        "vllm-sm80 cannot load what was assigned, violations: 1",
        f"  {LAYER}.mlp.down_proj (w:int4/g128 a:fp8/token) on {load_target('vllm-sm80').label}: "
        "4-bit weights with FP8 activations run on compute capability 9.0 only [w4a8-fp8]; "
        "use W4A16, or the target vllm-sm90 (assign: rule 1)",
    ]
    assert error.hint == "change the rules that chose these schemes, or compile for another --target"


def test_a_violation_of_the_whole_model_names_no_layer() -> None:
    cache = {"strategy": "attn_head"}
    error = refusal(block(), assign(rule("W8A8", layers=0), kv_cache=cache), {"legalize": {"target": "sglang"}})
    assert error.message.split("\n")[1:] == [
        f"  {load_target('sglang').label} does not take an FP8 KV cache with one scale per attn_head [kv-cache]; "
        "use strategy tensor",
    ]


def test_many_violations_are_counted_and_the_first_shown() -> None:
    error = refusal("llama", assign(rule("NVFP4", layers=":")), {"legalize": {"target": "vllm-cpu"}})
    first, *shown, last = error.message.split("\n")
    assert first.startswith("vllm-cpu cannot load what was assigned, violations: ")
    count = int(first.rpartition(" ")[2])
    assert last == f"  and {count - len(shown)} more"
    assert len(shown) == 8 < count


def test_nothing_is_read_to_refuse(described: Callable[[Graph], Path]) -> None:
    """A plan of a model without weights; and of one whose weights cannot be read, which nobody notices."""
    folder = described(block())
    passes = pipeline(assign(rule("MXFP4", structure="mlp-output")), "legalize")
    with pytest.raises(
        LegalityError, match=rf"vllm-cpu cannot load[^\n]*\n  {LAYER}.mlp.down_proj \(w:mxfp4 a:mxfp4\)"
    ):
        qcompiler.plan(folder, passes, target="vllm-cpu")
    (folder / "model.safetensors").write_bytes(b"no header")
    refusal(block(), assign(rule("MXFP4", layers=0)), {"legalize": {"target": "vllm-cpu"}}, folder=folder)


def test_the_command_lines_target_takes_precedence() -> None:
    rules = assign(rule("NVFP4", structure="mlp-output"))
    assert run(block(), rules, {"legalize": {"target": "vllm-cpu"}}, target="vllm-sm100").report.target == "vllm-sm100"
    assert "vllm-cpu cannot load" in refusal(block(), rules, "legalize", target="vllm-cpu").message
    assert run(block(), rules, "legalize").report.target == "vllm-sm90"


def test_an_unknown_target_is_an_error_with_near_names() -> None:
    with pytest.raises(ConfigError, match="unknown target 'vllm-sm9'; did you mean 'vllm-sm90'"):
        run(block(), assign(rule("W8A8", layers=0)), "legalize", target="vllm-sm9")


def test_groups_that_do_not_divide_activations_are_refused_whoever_assigned_them() -> None:
    """`assign` refuses them first; a pass of somebody else need not."""
    graph = run("llama", assign(rule("W8A8", structure="mlp-output"))).graph
    for node, _ in graph.linears():
        if (quant := get_quant(node)) is not None:
            set_quant(node, Quant(preset("FP8_BLOCK"), "rtn", ("another pass",)), replacing=quant)
    error = refusal(graph, {"legalize": {"target": "transformers"}})
    assert "its 176 inputs do not divide into groups of 128 [group-divides]; " in error.message
    assert "activations per token" in error.message


def test_activations_that_the_target_does_not_round_are_told() -> None:
    rules = assign(rule("FP8_DYNAMIC", structure="mlp-output"))
    told = f"does not round the activations of 1 linears as w:fp8/channel a:fp8/token says, {LAYER}.mlp.down_proj among"
    assert any(told in text for _, text in run(block(), rules, "legalize", target="vllm-sm80").notes)
    assert run(block(), rules, "legalize", target="vllm-sm89").notes == [NO_FILES]


def test_a_graph_without_a_quantized_linear_is_refused() -> None:
    error = refusal("llama", assign(rule(None, name="*")), "legalize")
    assert error.message == "no linear is quantized: every one is dense"
    assert error.hint == "let a rule of assign, or a target, mean linears"


def test_a_refusal_of_a_graph_that_stays_dense_tells_what_the_targets_met() -> None:
    embedding = {"targets": ["Embedding"], "scheme": "W8A16"}
    error = refusal("llama", {"assign-targets": {"assignments": [{"groups": [embedding]}]}}, "legalize")
    dense, *met = error.message.split("\n  ")
    assert dense == "no linear is quantized: every one is dense"
    assert met[0].startswith("assign-targets: target Embedding matches no linear (only embedding: model.embed_tokens)")


def test_legalizing_changes_no_legal_graph() -> None:
    graph = run(block(), assign(rule("W8A8", layers=0))).graph
    legal = run(graph, "legalize").graph
    assert legal.stage is Stage.ANNOTATED
    assert print_leaves(legal) == print_leaves(graph)


# --- Conv1D -----------------------------------------------------------------------------------------------------------

DENSE_CONV1D: Item = {"legalize": {"conv1d": "dense"}}


def test_a_conv1d_is_refused() -> None:
    error = refusal("gpt2", assign(rule("W8A8", structure="mlp-output")), "legalize")
    assert "transformer.h.0.mlp.c_proj (w:int8/channel a:int8/token)" in error.message
    assert "no on-disk form for Conv1D (transposed) weights [conv1d]; leave it dense" in error.message


def test_or_left_dense_visibly(golden: Golden) -> None:
    rules = assign(
        rule("W8A8", structure=["attention-input", "mlp-output", "lm-head"], layers=0),
        rule("W8A8", structure="lm-head"),
    )
    before = run("gpt2", rules).graph
    done = run(before, DENSE_CONV1D)
    assert done.notes[0] == (
        "fallback",
        "2 Conv1D layers stay dense (conv1d: dense), transformer.h.0.attn.c_attn among them: "
        "compressed-tensors has no form for them",
    )
    golden("legalize-conv1d", f"{print_leaves(before)}\n{print_leaves(done.graph)}")


def test_a_model_of_conv1d_alone_has_nothing_left_to_quantize() -> None:
    error = refusal("gpt2", assign(rule("W8A8", structure=ATTENTION)), DENSE_CONV1D)
    assert error.message == "no linear is quantized: every one is dense, and Conv1D layers cannot be otherwise"


def test_without_conv1d_the_option_says_nothing() -> None:
    assert run("llama", assign(rule("W8A8", structure="mlp-output")), DENSE_CONV1D).notes == [NO_FILES]


# --- names on disk ----------------------------------------------------------------------------------------------------


@cache
def concatenated() -> Graph:
    """A model whose q, k, v and gate are one tensor on disk."""
    return capture_graph(on_meta("hrm_text", H_cycles=1, L_cycles=1, num_layers_per_stack=1))


def test_codes_without_a_name_on_disk_are_refused(saved: Saved) -> None:
    error = refusal(
        concatenated(), assign(rule("W8A8", structure="attention-input")), "legalize", folder=saved(concatenated())
    )
    attention = "model.L_module.layers.0.self_attn"
    assert error.message.startswith(
        f"{attention}.q_proj has a scheme, but its codes have no name on disk: {attention}.q_proj.weight is stored "
        f"together with {attention}.gate_proj.weight, {attention}.k_proj.weight, {attention}.v_proj.weight as "
    )
    assert error.hint == "ignore this layer in assign"


def test_what_is_stored_together_may_stay_dense_and_is_counted(saved: Saved) -> None:
    folder = saved(concatenated())
    done = run(concatenated(), assign(rule("W8A8", structure="attention-output")), "legalize", folder=folder)
    predict(done.graph, done.source, done.report)
    weights = {row.path: row.bytes for row in done.report.layers}
    assert weights["model.L_module.layers.0.self_attn.q_proj"] == 64 * 64 * 4
    assert weights["model.L_module.layers.0.self_attn.o_proj"] == 64 * 64 + 64 * 4  # codes, and a scale per row
    linears = sum(weights.values())
    state = done.graph.model.state_dict()
    rest = sum(tensor.numel() for name, tensor in state.items() if name.removesuffix(".weight") not in weights)
    assert done.report.total_bytes == linears + 4 * rest


def test_without_weight_files_names_are_not_checked_and_that_is_said() -> None:
    assert run(concatenated(), assign(rule("W8A8", structure="attention-input")), "legalize").notes == [NO_FILES]


# --- whose config it is -----------------------------------------------------------------------------------------------


def test_a_config_is_proved_for_all_loaders(saved: Saved) -> None:
    done = run(block(), assign(rule("W8A8", layers=0)), "legalize", folder=saved(block()))
    assert done.graph.loaders == LOADERS
    assert done.report.config_summary == (
        "7 of 8 sites quantized by 1 groups with 7 targets, read alike by vllm, transformers, sglang"
    )
    assert done.notes == []


def test_where_another_loader_would_read_it_otherwise_it_is_left_out_and_that_is_said(saved: Saved) -> None:
    """Transformers would give dense experts the codes of the attention beside them."""
    rules = assign(rule(GROUPS_OF_32, structure=ATTENTION))
    done = run("mixtral", rules, {"legalize": {"target": "vllm-sm90"}}, folder=saved(run("mixtral").graph))
    assert done.graph.loaders == ("vllm", "sglang")
    assert done.report.config_summary.endswith("read alike by vllm, sglang")
    (fallback,) = (text for kind, text in done.notes if kind == "fallback")
    assert fallback.startswith("the config is not one for transformers: ")
    assert f"transformers reads {LAYER}.mlp.experts.0.gate_proj" in fallback
    assert [text for _, text in done.notes if text.startswith("Transformers cannot verify this checkpoint: ")] == [
        f"Transformers cannot verify this checkpoint: {LAYER}.mlp.experts.0.gate_proj (dense) on "
        f"{load_target('transformers').label}: "
        "dense experts do not load beside packed linears: they would stay at random"
    ]


def test_for_transformers_itself_that_is_a_violation() -> None:
    error = refusal("mixtral", assign(rule(GROUPS_OF_32, structure=ATTENTION)), "legalize", target="transformers")
    assert f"{LAYER}.mlp.experts.0.gate_proj (dense)" in error.message
    assert "[experts-dense]; quantize the experts too" in error.message


def test_what_transformers_cannot_load_is_refused_for_it_and_said_for_others(saved: Saved) -> None:
    """Falcon's class initializes linears by their weight, and a packed linear has none."""
    rules = assign(rule(GROUPS_OF_32, structure="mlp-output"))
    folder = saved(run("falcon").graph)
    wrong = "AttributeError: 'FalconLinear' object has no attribute 'weight'"
    assert wrong in refusal("falcon", rules, "legalize", target="transformers", folder=folder).message
    notes = run("falcon", rules, "legalize", target="vllm-sm90", folder=folder).notes
    assert ("info", f"Transformers cannot verify this checkpoint: {wrong}") in notes
    int8 = assign(rule("W8A8", structure="mlp-output"))  # its weight keeps its name
    assert run("falcon", int8, "legalize", target="transformers", folder=folder).notes == []


def test_beside_fp8_dense_experts_load_everywhere() -> None:
    done = run("mixtral", assign(rule("FP8_DYNAMIC", structure=ATTENTION)), "legalize")
    assert done.graph.loaders == LOADERS
    assert not any("Transformers" in text for _, text in done.notes)


def test_a_cache_that_transformers_does_not_take_is_to_blame_and_its_config_is_not_printed(saved: Saved) -> None:
    """OPT says no number of key/value heads, which ends in an error that shows its whole config."""
    opt = run("opt").graph
    rules = assign(rule("FP8_DYNAMIC", structure="mlp-input"), kv_cache={"strategy": "tensor"})
    error = refusal(opt, rules, {"legalize": {"target": "transformers"}}, folder=saved(opt))
    assert error.message.startswith("transformers cannot load this model with a quantized KV cache: ValueError: ")
    assert error.message.endswith("`num_key_value_heads`.")
    assert error.hint == "take out kv_cache (kv_cache_scheme in a recipe), or compile for another --target or --dtype"
