"""Rules: what they select, what they decide and why, and what they are refused for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qcompiler.errors import QCompilerError, RuleError
from qcompiler.ir.annotations import Leaf, Role, annotate, get_quant, need
from qcompiler.ir.graph import Graph
from qcompiler.ir.printer import print_leaves
from qcompiler.lowering.predict import predict
from qcompiler.scheme import KVCacheSpec, Strategy, preset
from tests.capture.models import captured
from tests.conftest import Golden
from tests.ir.graphs import again, leaf
from tests.passes.models import Item, assign, block, copied, rule, run

FIRST, LAST = "model.layers.0", "model.layers.1"
GROUPS_OF_32 = {"weights": {"type": "int", "bits": 8, "group_size": 32}}
"""A scheme whose groups divide the 64 inputs of the tiny Llama's linears, but not the 176 of its down_proj."""


def chosen(graph: Graph) -> dict[str, str]:
    """What became of each linear that something was decided about."""
    found = {linear.path: get_quant(node) for node, linear in graph.linears()}
    return {path: quant.scheme.short if quant.scheme else "dense" for path, quant in found.items() if quant}


def because(graph: Graph, path: str) -> tuple[str, ...]:
    return next(quant.because for node, linear in graph.linears() if linear.path == path and (quant := get_quant(node)))


def refusal(model: Graph | str, *passes: Item) -> QCompilerError:
    with pytest.raises(RuleError) as error:
        run(model, *passes)
    return error.value


def test_a_graph_before_and_after(golden: Golden) -> None:
    rules = (
        rule({"weights": {"type": "int", "bits": 8, "group_size": 128}}, structure="mlp-output"),
        rule("W4A16_ASYM", structure=["attention-input", "attention-output", "mlp-input"]),
    )
    done = run(block(), assign(*rules, ignore=[{"structure": "lm-head"}]))
    golden("assign", f"{print_leaves(block())}\n{print_leaves(done.graph)}")


# --- select -----------------------------------------------------------------------------------------------------------

ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("select", "wanted"),
    [
        ({"name": "*.down_proj"}, [f"{layer}.mlp.down_proj" for layer in (FIRST, LAST)]),
        ({"name": f"{FIRST}.mlp.down_proj"}, [f"{FIRST}.mlp.down_proj"]),
        ({"name": r"re:.*\.0\.self_attn\."}, [f"{FIRST}.{name}" for name in ATTENTION]),
        ({"name": ["*.o_proj", "lm_*"]}, [f"{FIRST}.self_attn.o_proj", f"{LAST}.self_attn.o_proj", "lm_head"]),
        ({"layers": 0}, [f"{FIRST}.{name}" for name in ATTENTION + MLP]),
        ({"layers": -1}, [f"{LAST}.{name}" for name in ATTENTION + MLP]),
        ({"layers": ":-1", "structure": "mlp-output"}, [f"{FIRST}.mlp.down_proj"]),
        ({"layers": ["1:", 1], "structure": "attention-output"}, [f"{LAST}.self_attn.o_proj"]),
        ({"structure": "lm-head", "class": ["Linear", "Conv1D"]}, ["lm_head"]),
        ({"min_parameters": 320 * 64}, ["lm_head"]),
        ({"min_parameters": 176 * 64, "name": "model.*", "layers": 0}, [f"{FIRST}.{name}" for name in MLP]),
    ],
    ids=str,
)
def test_keys_all_hold_and_lists_mean_any_of(select: dict[str, Any], wanted: list[str]) -> None:
    assert sorted(chosen(run("llama", assign(rule("W8A8", **select))).graph)) == sorted(wanted)


@pytest.mark.parametrize(
    ("select", "says"),
    [
        ({"name": "*.q_porj"}, "did you mean 'q_proj'"),
        ({"name": r"re:.*\.gate_poj$"}, "did you mean 'gate_proj'"),
        ({"name": f"{FIRST}.mlp.dwn_proj"}, f"did you mean '{FIRST}.mlp.down_proj'"),
        ({"name": "xyz"}, f"names look like {FIRST}.self_attn.q_proj"),
        ({"class": "Conv1D"}, "the model has classes Linear"),
        ({"layers": "2:"}, "the model has layers 0 to 1"),
        ({"min_parameters": 20481}, "the largest has 20480 parameters"),
        ({"structure": "router"}, "the model has structures attention-input, attention-output, lm-head, mlp-input"),
        ({"structure": "router"}, "; no router, nearest: whatever could be one has another place"),
        ({"structure": "mlp-output", "layers": 2}, f"nearest: {FIRST}.mlp.down_proj (but for layers: 0); {LAST}"),
        ({"name": "*.o_proj", "structure": "mlp-output"}, f"{FIRST}.self_attn.o_proj (but for structure: attention-"),
        ({"name": "*.o_proj", "min_parameters": 9999}, f"{FIRST}.self_attn.o_proj (but for min_parameters: 4096)"),
    ],
    ids=str,
)
def test_a_rule_that_matches_nothing_lists_near_misses(select: dict[str, Any], says: str) -> None:
    error = refusal("llama", assign(rule("W8A8", **select)))
    assert error.message.startswith("assign: rule 1 {")
    assert "matches no linear; " in error.message
    assert says in error.message
    assert error.hint is not None
    assert "say `optional: true`" in error.hint


def test_a_rule_shows_the_select_as_it_was_written() -> None:
    error = refusal("llama", assign(rule("W8A8", name=["*.a", "re:b"], layers=[1, "2:"], class_="C")))
    assert "rule 1 {name: [*.a, re:b], class: C, layers: [1, 2:]} matches no linear" in error.message


def test_an_optional_rule_that_matches_nothing_is_reported() -> None:
    done = run("llama", assign(rule("W8A8", structure="router", optional=True), rule("W8A8", layers=0)))
    assert done.notes == [("info", "assign: rule 1 {structure: router} matches no linear, which its `optional` allows")]
    assert because(done.graph, f"{FIRST}.mlp.up_proj") == ("assign: rule 2",)


def test_an_optional_rule_whose_layers_are_ignored_is_reported_as_that() -> None:
    rules = (rule("W8A8", structure="lm-head", optional=True), rule("W8A8", layers=0))
    done = run("llama", assign(*rules, ignore=[{"structure": "lm-head"}]))
    ((_, note),) = done.notes
    assert "matches no linear (lm_head is hidden by assign: ignore 1), which its `optional` allows" in note


@pytest.mark.parametrize(
    ("model_type", "select", "instead"),
    [
        ("mixtral", {"structure": "router"}, f"only bare-linear: {FIRST}.mlp.gate"),
        ("mixtral", {"structure": "experts"}, f"only experts: {FIRST}.mlp.experts"),
        ("mixtral", {"name": f"{FIRST}.mlp.*"}, f"only bare-linear, experts: {FIRST}.mlp.gate"),
        ("llama", {"structure": "embedding"}, "only embedding: model.embed_tokens"),
    ],
    ids=str,
)
def test_a_rule_for_what_is_not_quantized_says_what_it_found(
    model_type: str, select: dict[str, Any], instead: str
) -> None:
    error = refusal(model_type, assign(rule("W8A8", **select)))
    assert f"matches no linear ({instead}, which is not quantized); " in error.message


# --- ignore -----------------------------------------------------------------------------------------------------------


def test_what_is_ignored_stays_dense_and_no_rule_sees_it() -> None:
    done = run("llama", assign(rule("W8A8", name="*"), ignore=[{"structure": "lm-head"}, {"layers": 0}]))
    assert {path for path, scheme in chosen(done.graph).items() if scheme != "dense"} == {
        f"{LAST}.{name}" for name in ATTENTION + MLP
    }
    assert because(done.graph, "lm_head") == ("assign: ignore 1",)
    assert because(done.graph, f"{FIRST}.mlp.up_proj") == ("assign: ignore 2",)


def test_a_rule_for_what_is_ignored_says_so() -> None:
    error = refusal("llama", assign(rule("W8A8", structure="lm-head"), ignore=[{"layers": 0}, {"name": "lm_head"}]))
    assert "matches no linear (lm_head is hidden by assign: ignore 2); " in error.message


def test_an_ignore_that_matches_nothing_lists_near_misses() -> None:
    error = refusal("llama", assign(rule("W8A8", layers=0), ignore=[{"name": "lm_head"}, {"name": "*.embed_token"}]))
    assert error.message.startswith(
        "assign: ignore 2 {name: *.embed_token} matches nothing; did you mean 'embed_tokens'"
    )
    assert error.hint is not None
    assert error.hint.startswith("remove it, or mend its keys")


def test_routers_experts_and_embeddings_may_be_ignored() -> None:
    ignored = [{"structure": structure} for structure in ("router", "experts", "embedding")]
    done = run("mixtral", assign(rule("W8A8", layers=0), ignore=ignored))
    assert set(chosen(done.graph).values()) == {preset("W8A8").short}


# --- two rules --------------------------------------------------------------------------------------------------------


def test_two_rules_for_one_linear_are_refused_naming_both() -> None:
    rules = (rule("W8A8", structure="attention-output"), rule("W8A16", name="*.o_proj", layers=-1))
    error = refusal("llama", assign(*rules))
    assert error.message == (
        f"assign: rule 2 {{name: *.o_proj, layers: -1}} and assign: rule 1 both decide {LAST}.self_attn.o_proj"
    )
    assert error.hint is not None
    assert "`override: true`" in error.hint


def test_the_later_rule_may_override_and_remembers_whom() -> None:
    rules = (rule(None, structure="attention-output"), rule("W8A8", name="*.o_proj", layers=-1, override=True))
    graph = run("llama", assign(*rules)).graph
    assert chosen(graph) == {f"{FIRST}.self_attn.o_proj": "dense", f"{LAST}.self_attn.o_proj": preset("W8A8").short}
    assert because(graph, f"{FIRST}.self_attn.o_proj") == ("assign: rule 1",)
    assert because(graph, f"{LAST}.self_attn.o_proj") == ("assign: rule 2", "over assign: rule 1")


def test_several_assigns_are_told_apart_by_number() -> None:
    graph = run(
        "llama",
        assign(rule("W8A8", structure="mlp-output"), ignore=[{"structure": "lm-head"}]),
        assign(rule("FP8", structure="mlp-output", layers=0, override=True)),
    ).graph
    assert because(graph, f"{FIRST}.mlp.down_proj") == ("assign 2: rule 1", "over assign 1: rule 1")
    assert because(graph, f"{LAST}.mlp.down_proj") == ("assign 1: rule 1",)
    assert because(graph, "lm_head") == ("assign 1: ignore 1",)
    again = assign(rule("W8A8", structure="mlp-output"))
    assert "and assign 1: rule 1 both decide" in refusal("llama", again, again).message


def test_a_rule_may_make_what_another_quantizes_dense() -> None:
    rules = (rule("W8A8", structure="mlp-output"), rule(None, layers=0, structure="mlp-output", override=True))
    assert chosen(run("llama", assign(*rules)).graph) == {
        f"{FIRST}.mlp.down_proj": "dense",
        f"{LAST}.mlp.down_proj": preset("W8A8").short,
    }


def test_two_passes_are_two_rules() -> None:
    error = refusal("llama", assign(rule("W8A8", layers=0)), assign(rule("W8A16", structure="mlp-output")))
    assert f"both decide {FIRST}.mlp.down_proj" in error.message
    apart = run("llama", assign(rule("W8A8", layers=0)), assign(rule("W8A8", layers=1)))
    assert len(chosen(apart.graph)) == 2 * len(ATTENTION + MLP)


# --- fusion groups ----------------------------------------------------------------------------------------------------


def test_two_schemes_in_one_fusion_group_show_who_asked_for_what() -> None:
    rules = (rule("W8A8", name="*.q_proj"), rule("FP8_DYNAMIC", name="*.k_proj"))
    error = refusal("llama", assign(*rules, ignore=[{"name": f"{FIRST}.self_attn.v_proj"}]))
    assert error.message.split("\n") == [
        "fusion group l0.qkv: its linears are fused by runtimes and must share one scheme, but",
        f"  {FIRST}.self_attn.q_proj: w:int8/channel a:int8/token, by assign: rule 1",
        f"  {FIRST}.self_attn.k_proj: w:fp8/channel a:fp8/token, by assign: rule 2",
        f"  {FIRST}.self_attn.v_proj: dense, by assign: ignore 1",
    ]
    assert error.hint is not None
    assert "select by structure" in error.hint


def test_a_fused_linear_that_no_rule_selects_is_a_difference() -> None:
    error = refusal("llama", assign(rule("W8A8", name="*.up_proj")))
    assert f"  {FIRST}.mlp.gate_proj: dense, no rule selects it" in error.message


def test_keys_and_values_that_another_layer_reads_too_are_fused_with_their_own_query() -> None:
    error = refusal("gemma3n_text", assign(rule("W8A8", name="*.layers.0.self_attn.q_proj")))
    fused = [line.partition(":")[0].strip() for line in error.message.split("\n")[1:]]
    assert fused == [f"{FIRST}.self_attn.{name}_proj" for name in "qkv"]


def test_linears_that_only_read_one_tensor_may_differ() -> None:
    rules = (rule("W8A8", structure="attention-input"), rule("FP8_DYNAMIC", structure="mlp-input"))
    schemes = chosen(run("phi", assign(*rules)).graph)
    assert schemes[f"{FIRST}.self_attn.q_proj"] != schemes[f"{FIRST}.mlp.fc1"]


# --- group sizes that do not divide -----------------------------------------------------------------------------------

INDIVISIBLE = f"group size 32 does not divide the 176 inputs of {FIRST}.mlp.down_proj"


def test_a_group_size_that_does_not_divide_is_an_error() -> None:
    error = refusal("llama", assign(rule("W8A8", layers=1), rule(GROUPS_OF_32, layers=0)))
    assert error.message == f"assign: rule 2: {INDIVISIBLE}"
    assert error.hint == "choose a group size that divides, or say on_indivisible: channel or dense"


@pytest.mark.parametrize(("instead", "scheme"), [("channel", "w:int8/channel"), ("dense", "dense")])
def test_or_falls_back_as_asked_and_reports_it(instead: str, scheme: str) -> None:
    done = run("llama", assign(rule(GROUPS_OF_32, layers=0), on_indivisible=instead))
    assert chosen(done.graph) == {
        **{f"{FIRST}.{name}": "w:int8/g32" for name in ATTENTION + MLP},
        f"{FIRST}.mlp.down_proj": scheme,
    }
    assert done.notes == [("fallback", f"{INDIVISIBLE}: {instead} instead (assign: rule 1)")]
    why = INDIVISIBLE.removesuffix(f" of {FIRST}.mlp.down_proj")
    assert because(done.graph, f"{FIRST}.mlp.down_proj") == ("assign: rule 1", why)


def test_only_the_rule_that_decides_in_the_end_must_fit() -> None:
    channel = rule("W8A8", structure="mlp-output", override=True)
    for instead in ("error", "channel", "dense"):
        done = run("llama", assign(rule(GROUPS_OF_32, name="*_proj"), channel, on_indivisible=instead))
        assert chosen(done.graph)[f"{FIRST}.mlp.down_proj"] == "w:int8/channel a:int8/token"
        assert done.notes == []


def test_layers_that_fall_back_alike_share_a_note() -> None:
    done = run("llama", assign(rule(GROUPS_OF_32, name="*_proj"), on_indivisible="channel"))
    assert done.notes == [("fallback", f"{INDIVISIBLE} and 1 more: channel instead (assign: rule 1)")]


@pytest.mark.parametrize(
    ("keys", "lost"),
    [
        ({"name": ["*.o_proj", "*.k_prj"]}, "name '*.k_prj'"),
        ({"layers": [0, 77, "5:"]}, "layer 77 or layer '5:'"),
    ],
)
def test_an_element_of_a_list_that_matches_nothing_is_an_error(keys: dict[str, object], lost: str) -> None:
    error = refusal("llama", assign(rule("W8A8", **keys), rule("W8A8", name="*", override=True)))
    assert error.message.endswith(f": nothing has {lost}")
    assert not run("llama", assign({**rule("W8A8", **keys), "optional": True})).notes
    ignoring = refusal("llama", assign(rule("W8A8", name="*o_proj"), ignore=[keys]))
    assert ignoring.message.startswith("assign: ignore 1")
    assert ignoring.message.endswith(f": nothing has {lost}")


def test_an_ignore_cannot_take_back_what_an_earlier_pass_assigned() -> None:
    error = refusal("llama", assign(rule("W8A8", name="*_proj")), assign(ignore=[{"structure": "mlp-output"}]))
    assert (
        "would leave model.layers.0.mlp.down_proj dense, and assign 1: rule 1 gave it a scheme before" in error.message
    )


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8A16"])
@pytest.mark.parametrize("asked", ["error", "channel"])
def test_numbers_that_live_in_groups_have_no_channel_form(name: str, asked: str) -> None:
    error = refusal("llama", assign(rule(name, layers=0), on_indivisible=asked))
    assert error.message == f"assign: rule 1: {INDIVISIBLE} ({preset(name).short} has no per-channel form)"
    assert error.hint == "choose a group size that divides, or say on_indivisible: dense"
    dense = run("llama", assign(rule(name, layers=0), on_indivisible="dense"))
    assert chosen(dense.graph)[f"{FIRST}.mlp.down_proj"] == "dense"


def test_groups_of_activations_must_divide_too() -> None:
    """FP8_BLOCK's weights end inside a block where they must; its activations come in groups of 128."""
    error = refusal("llama", assign(rule("FP8_BLOCK", structure="mlp-output"), on_indivisible="channel"))
    assert f"group size 128 does not divide the 176 inputs of {FIRST}.mlp.down_proj" in error.message
    assert "has no per-channel form" in error.message
    assert len(chosen(run(block(), assign(rule("FP8_BLOCK", layers=0))).graph)) == len(ATTENTION + MLP)


def test_a_per_channel_fallback_keeps_numbers_and_activations() -> None:
    scheme = preset("W4A8").model_copy(update={"weights": preset("W4A16_ASYM").weights})
    done = run("llama", assign(rule(scheme.model_dump(mode="json"), structure="mlp-output"), on_indivisible="channel"))
    found = next(q.scheme for node, _ in done.graph.linears() if (q := get_quant(node)))
    assert found is not None
    assert (found.weights.bits, found.weights.symmetric, found.weights.strategy) == (4, False, Strategy.CHANNEL)
    assert found.input_activations == scheme.input_activations


# --- experts, modules that run twice, the cache -----------------------------------------------------------------------


def test_experts_stay_dense_and_the_report_says_so() -> None:
    done = run("mixtral", assign(rule("W8A8", name="*", optional=True)))
    assert done.notes == [("info", f"blocks of experts stay dense: 2, {FIRST}.mlp.experts the first of them")]
    assert not any("experts" in path or "gate" in path for path in chosen(done.graph))
    predict(done.graph, done.source, done.report)
    rows = {row.path: (row.scheme, row.because) for row in done.report.layers}
    assert rows[f"{FIRST}.mlp.experts"] == (None, "blocks of experts are not quantized")
    assert rows[f"{FIRST}.mlp.gate"] == (None, "a linear without a module of its own is not quantized")


def test_a_module_that_runs_twice_gets_one_decision() -> None:
    graph = run("gemma3n_text", assign(rule("W8A8", name="*.altup.modality_router"))).graph
    calls = [node for node, linear in graph.linears() if linear.path == f"{FIRST}.altup.modality_router"]
    assert len(calls) == 2
    assert [get_quant(node) for node in calls] == [get_quant(calls[0])] * 2
    assert because(graph, f"{FIRST}.altup.modality_router") == ("assign: rule 1",)


@pytest.fixture
def reused() -> Graph:
    """The tiny Llama, the last layer of which runs the first one's down_proj again."""
    graph = copied(captured("llama"))
    last = leaf(graph, f"{LAST}.mlp.down_proj")
    node = again(graph, leaf(graph, f"{FIRST}.mlp.down_proj"))
    last.append(node)
    node.args = last.args
    annotate(node, replace(need(node, Role), layer=1), replacing=need(node, Role))
    last.replace_all_uses_with(node)
    graph.fx.erase_node(last)
    return graph


@pytest.mark.parametrize("layer", [0, 1])
def test_a_rule_for_one_layer_decides_for_a_module_wherever_it_runs(reused: Graph, layer: int) -> None:
    graph = run(reused, assign(rule("W8A8", layers=layer, structure="mlp-output"))).graph
    calls = [node for node, _ in graph.linears() if need(node, Role).structure == "mlp-output"]
    assert {need(node, Leaf).path for node in calls} == {f"{FIRST}.mlp.down_proj"}
    assert [quant.scheme for node in calls if (quant := get_quant(node))] == [preset("W8A8")] * 2


def test_rules_for_two_layers_in_which_one_module_runs_contradict_each_other(reused: Graph) -> None:
    rules = [rule(scheme, layers=layer, structure="mlp-output") for layer, scheme in enumerate(("W8A8", "W8A16"))]
    assert f"assign: rule 1 both decide {FIRST}.mlp.down_proj" in refusal(reused, assign(*rules)).message
    assert len(chosen(run(reused, assign(rules[0], ignore=[{"layers": 0, "structure": "mlp-input"}])).graph)) == 3


def test_the_cache_is_decided_once() -> None:
    once = run("llama", assign(rule("W8A8", layers=0), kv_cache={"strategy": "attn_head"}), assign())
    assert once.graph.kv_cache == KVCacheSpec(strategy="attn_head")
    assert run("llama", assign(kv_cache={}), assign(kv_cache={})).graph.kv_cache == KVCacheSpec()
    error = refusal("llama", assign(kv_cache={}), assign(kv_cache={"strategy": "attn_head"}))
    assert error.message == "assign: kv_cache asks for one scale per attn_head, and an earlier pass for one per tensor"
    assert captured("llama").kv_cache is None
