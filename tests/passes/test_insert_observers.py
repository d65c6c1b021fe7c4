"""Observers: where they stand, who shares them, and that nothing else changes."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from transformers import PreTrainedModel

from qcompiler.capture.twin import build_twin
from qcompiler.errors import LegalityError
from qcompiler.ir.annotations import (
    AnyObserver,
    ChannelObserver,
    HessianObserver,
    Leaf,
    Observer,
    Role,
    get,
    need,
    observed,
)
from qcompiler.ir.fx import is_op, tensor_arg, value
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.observers import as_one
from qcompiler.ir.ops import observe
from qcompiler.ir.partition import partitions
from qcompiler.ir.printer import Printer, print_graph
from qcompiler.patterns.place import rescales
from qcompiler.patterns.vocabulary import SDPA
from qcompiler.runtime.evaluate import evaluate
from qcompiler.scheme import PRESETS, Strategy, preset
from tests.capture.models import captured
from tests.conftest import Golden
from tests.ir.graphs import again, changed, insert, leaf, observers
from tests.passes.models import assign, block, copied, recurrent, rule, run
from tests.renaming import renamed
from tests.zoo import tiny_config

LAYER = "model.layers.0"
STATIC = preset("FP8").input_activations
assert STATIC is not None


def shared(graph: Graph) -> dict[str, tuple[str, ...]]:
    """Who uses each statistic of inputs, by its id."""
    found: dict[str, tuple[str, ...]] = defaultdict(tuple)
    for node in observers(graph, "input"):
        observer = need(node, Observer)
        found[observer.id] = (*found[observer.id], *observer.consumers)
    return dict(found)


def layer(graph: Graph) -> str:
    """The first decoder layer, printed."""
    (part,) = (part for part in partitions(graph) if part.layer == 0)
    return f"{part.name} of {type(graph.model).__name__} ({graph.stage})\n{Printer(graph).lines(part.nodes)}\n"


def test_a_layer_before_and_after(golden: Golden) -> None:
    """Static FP8 on q, k and v, which share one observer; NVFP4 on gate and up, which share another; a cache."""
    rules = assign(rule("FP8", structure="attention-input"), rule("NVFP4", structure="mlp-input"), kv_cache={})
    before = run(block(), rules).graph
    golden("insert-observers", f"{layer(before)}\n{layer(run(before, 'insert-observers').graph)}")


def test_a_layer_whose_scales_move(golden: Golden) -> None:
    """AWQ from the norm to q, k and v, and from up to down: who gives, who takes, and what is collected for it."""
    awq = ({**rule("W4A16", structure=name), "transform": "awq"} for name in ("attention-input", "mlp-output"))
    golden("insert-observers-awq", layer(run(block(), assign(*awq), "insert-observers").graph))


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_linears_of_one_input_and_one_scheme_share_an_observer() -> None:
    graph = run("phi", assign(rule("FP8", layers=0)), "insert-observers").graph
    first, *_ = observers(graph, "input")
    readers = [f"{LAYER}.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")]
    assert need(first, Observer) == Observer(
        id="l0.attention-input.fp8/tensor",
        kind="minmax",
        spec=STATIC,
        purpose="input",
        consumers=tuple(readers),
        because=("insert-observers: the input scale of fp8/tensor is measured",),
    )
    assert [need(user, Leaf).path for user in first.users] == readers
    assert shared(graph) == {
        "l0.attention-input.fp8/tensor": tuple(readers),
        "l0.attention-output.fp8/tensor": (f"{LAYER}.self_attn.dense",),
        "l0.mlp-output.fp8/tensor": (f"{LAYER}.mlp.fc2",),
    }


def test_two_schemes_on_one_tensor_have_two_observers_of_it() -> None:
    rules = (rule("FP8", structure="attention-input", layers=0), rule("NVFP4", structure="mlp-input", layers=0))
    graph = run("phi", assign(*rules), "insert-observers").graph
    first, second = observers(graph, "input")
    assert first.args == second.args == (leaf(graph, f"{LAYER}.input_layernorm"),)
    assert [(need(node, Observer).spec.short, len(node.users)) for node in (first, second)] == [
        ("fp8/tensor", 3),
        ("nvfp4", 1),
    ]


def test_members_of_a_group_that_read_it_through_views_share_the_statistic() -> None:
    graph = run("llama", assign(rule("FP8", structure="attention-input", layers=0))).graph
    k = leaf(graph, f"{LAYER}.self_attn.k_proj")
    k.args = (insert(graph, torch.ops.aten.contiguous.default, k.args[0], like=k),)
    done = run(graph, "insert-observers").graph
    assert len(observers(done, "input")) == 2
    assert {need(node, Observer).id for node in observers(done, "input")} == {"l0.attention-input.fp8/tensor"}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_only_numbers_that_must_be_measured_are(name: str) -> None:
    before = run(block(), assign(rule(name, layers=0))).graph
    after = run(before, "insert-observers").graph
    assert after.stage is Stage.OBSERVED
    if name in ("FP8", "NVFP4"):
        assert len(observers(after, "input")) == 4
    else:
        assert print_graph(after) == print_graph(before).replace("(annotated)", "(observed)")


@pytest.mark.parametrize(
    ("options", "kind", "percentile"),
    [
        ({}, "minmax", 99.99),
        ({"inputs": "mse"}, "mse", 99.99),
        ({"inputs": "percentile", "percentile": 99.0}, "percentile", 99.0),
    ],
    ids=["minmax", "mse", "percentile"],
)
def test_the_statistic_is_an_option(options: dict[str, Any], kind: str, percentile: float) -> None:
    graph = run(block(), assign(rule("FP8", layers=0), kv_cache={}), {"insert-observers": options}).graph
    assert {(o.kind, o.percentile) for n in observers(graph, "input") if (o := get(n, Observer))} == {
        (kind, percentile)
    }
    assert {need(node, Observer).kind for node in observers(graph, "key")} == {"minmax"}


@pytest.mark.parametrize("kind", ["minmax", "mse", "percentile"])
@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_the_statistic_of_the_cache_is_an_option_of_its_own(strategy: str, kind: str) -> None:
    options = {"kv_cache": kind, "percentile": 99.0}
    rules = assign(rule("FP8", layers=0), kv_cache={"strategy": strategy})
    graph = run(block(), rules, {"insert-observers": options}).graph
    for part in ("key", "value"):
        (node,) = observers(graph, part)
        assert (need(node, Observer).kind, need(node, Observer).percentile) == (kind, 99.0)
    assert {need(node, Observer).kind for node in observers(graph, "input")} == {"minmax"}


def test_nvfp4_inputs_say_that_their_whole_range_is_collected_where_mse_was_asked_for() -> None:
    """In the annotation and in the report; a percentile of them is collected as it was asked for."""
    rules = assign(rule("FP8", structure="attention-input"), rule("NVFP4", structure="mlp-input"))
    done = run(block(), rules, {"insert-observers": {"inputs": "mse"}})
    found = {o.spec.short: o for node in observers(done.graph, "input") if (o := get(node, Observer))}
    assert {spec: o.kind for spec, o in found.items()} == {"fp8/tensor": "mse", "nvfp4": "minmax"}
    instead = "minmax instead of mse"
    assert [text.startswith(instead) for text in found["nvfp4"].because] == [False, True]
    assert not any(instead in text for text in found["fp8/tensor"].because)
    (note,) = [(kind, text) for kind, text in done.notes if "instead" in text]
    assert note == ("fallback", f"insert-observers: {instead} for nvfp4 inputs: {note[1].partition('inputs: ')[2]}")
    for options in ({"inputs": "percentile"}, {}):
        quiet = run(block(), rules, {"insert-observers": options})
        assert not any(kind == "fallback" for kind, _ in quiet.notes)
        kinds = {need(node, Observer).kind for node in observers(quiet.graph, "input")}
        assert kinds == {options.get("inputs", "minmax")}


# --- modules that run several times -----------------------------------------------------------------------------------


def test_calls_of_one_module_share_a_statistic() -> None:
    graph = run("gemma3n_text", assign(rule("FP8", name="*.layers.0.altup.modality_router")), "insert-observers").graph
    first, second = observers(graph, "input")
    assert first.args != second.args
    assert need(first, Observer).id == need(second, Observer).id


@pytest.mark.parametrize("kind", [Observer, HessianObserver, ChannelObserver])
def test_linears_that_share_an_input_once_share_the_statistic_of_all_their_inputs(kind: type[AnyObserver]) -> None:
    """Gate and up read one tensor, and gate reads another too: each observer must know that up needs it."""
    rules = rule("W4A16" if kind is HessianObserver else "FP8", structure="mlp-input", layers=0)
    if kind is HessianObserver:
        rules = {**rules, "solver": "gptq"}
    graph = run(block(), assign(rules)).graph
    second = changed(again(graph, leaf(graph, f"{LAYER}.mlp.gate_proj")), Role, input_group="another")
    second.args = (leaf(graph, f"{LAYER}.input_layernorm"),)
    importance = {"importance": kind is ChannelObserver}
    done = run(graph, {"insert-observers": importance}).graph
    found = [observer for node in done.nodes if isinstance(observer := observed(node), kind)]
    assert len(found) == 2
    assert {observer.id for observer in found} == {found[0].id}
    for observer in found:
        assert observer.consumers == (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj")


def test_statistics_that_meet_in_one_module_are_the_first() -> None:
    asked = [("a", ("gate",)), ("b", ("up",)), ("c", ("down",)), ("d", ("up", "gate")), ("c", ("other",))]
    assert as_one(asked) == [
        ("a", ("gate", "up")),
        ("a", ("gate", "up")),
        ("c", ("down", "other")),
        ("a", ("gate", "up")),
        ("c", ("down", "other")),
    ]


@pytest.mark.parametrize(
    ("options", "says", "hint"),
    [
        (
            {},
            "L_module.layers.0.mlp.down_proj runs in several partitions (",
            "use a scheme whose activations are dynamic",
        ),
        (
            {"kv_cache": {}},
            "L_module.layers.0.self_attn runs in several partitions (",
            "take out kv_cache (kv_cache_scheme in a recipe)",
        ),
    ],
    ids=["input", "cache"],
)
def test_what_runs_in_several_partitions_cannot_be_measured_in_one(
    options: dict[str, Any], says: str, hint: str
) -> None:
    scheme = "W8A8" if options else "FP8"
    with pytest.raises(LegalityError) as error:
        run(recurrent(), assign(rule(scheme, structure="mlp-output"), **options), "insert-observers")
    assert says in error.value.message
    assert error.value.hint is not None
    assert hint in error.value.hint
    assert (
        run(recurrent(), assign(rule("W8A8", structure="mlp-output")), "insert-observers").graph.stage is Stage.OBSERVED
    )


# --- the key/value cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "heads"), [("mixtral", 2), ("falcon", 1), ("gpt2", 4), ("gpt_oss", 2), ("bloom", 4), ("mpt", 4)]
)
def test_keys_and_values_are_observed_as_they_enter_the_cache(model_type: str, heads: int) -> None:
    """Before grouped-query attention repeats their heads, and by the name of the attention."""
    graph = run(model_type, assign(kv_cache={"strategy": "attn_head"}), "insert-observers").graph
    attentions = [path for path, module in graph.model.named_modules() if type(module).__name__.endswith("Attention")]
    assert len(attentions) == 2
    for purpose in ("key", "value"):
        found = [(node, need(node, Observer)) for node in observers(graph, purpose)]
        assert [observer.consumers for _, observer in found] == [(path,) for path in attentions]
        assert [observer.id for _, observer in found] == [f"{path}.{purpose}" for path in attentions]
        assert {observer.spec.strategy for _, observer in found} == {Strategy.ATTN_HEAD}
        assert {observer.because for _, observer in found} == {
            ("insert-observers: the KV cache is quantized to fp8 per attn_head",)
        }
        assert {value(node).shape[1] for node, _ in found} == {heads}


def test_no_scale_moves_into_values_that_a_quantized_cache_holds() -> None:
    """Its scale would be that of other values; into anything else scales move as without a cache."""
    smoothed = [
        {**rule("W4A16", structure=kind), "transform": "smoothquant"}
        for kind in ("attention-input", "attention-output")
    ]
    kept, moved = (run(block(), assign(*smoothed, kv_cache=cache), "insert-observers") for cache in ({}, None))
    givers = [[found.producer for found in rescales(done.graph.nodes)] for done in (kept, moved)]
    norm = f"{LAYER}.input_layernorm"
    assert givers == [[norm], [norm, f"{LAYER}.self_attn.v_proj"]]
    (told,) = [text for kind, text in kept.notes if kind == "fallback"]
    assert told.startswith(f"no smoothquant for {LAYER}.self_attn.o_proj, quantized without it: ")
    assert "v_proj: its values are cached, and the scale of the quantized cache is measured on them as they are" in told
    assert not any(kind == "fallback" for kind, _ in moved.notes)


def test_layers_that_share_keys_and_values_observe_them_for_each() -> None:
    graph = run("gemma3n_text", assign(kv_cache={}), "insert-observers").graph
    owners = [need(node, Observer).consumers[0] for node in observers(graph, "key")]
    assert sorted(owners) == [f"model.layers.{index}.self_attn" for index in range(3)]


def test_an_attention_that_is_not_understood_is_refused_with_what_is_in_the_way() -> None:
    graph = copied(captured("llama"))
    attention = next(node for node in graph.nodes if is_op(node, SDPA))
    key = tensor_arg(attention, 1)
    assert key is not None
    with graph.fx.inserting_before(attention):
        sine = graph.fx.call_function(torch.ops.aten.sin.default, (key,))
    sine.meta |= key.meta
    attention.replace_input_with(key, sine)
    with pytest.raises(LegalityError) as error:
        run(graph, assign(kv_cache={}), "insert-observers")
    assert error.value.message.startswith(
        "the KV cache cannot be quantized: the model has an attention whose keys and "
    )
    assert f"walking back from %{attention.name} to key (a linear or conv1d) stopped at %{sine.name} (aten.sin)" in (
        error.value.message
    )
    assert error.value.message.endswith(", in model.layers.0.self_attn")
    assert error.value.hint == "take out kv_cache (kv_cache_scheme in a recipe)"


def test_a_cache_that_holds_latents_is_refused() -> None:
    with pytest.raises(LegalityError, match=r"kv_b_proj makes the values of \S+self_attn of a latent") as error:
        run("deepseek_v3", assign(kv_cache={}), "insert-observers")
    assert error.value.hint == "take out kv_cache (kv_cache_scheme in a recipe)"


def test_a_cache_that_holds_something_else_than_attention_reads_is_refused() -> None:
    with pytest.raises(LegalityError, match=r"XLMWithLMHeadModel puts 0 tensors into it where its attention reads 4"):
        run("xlm", assign(kv_cache={}), "insert-observers")


# --- by structure, and without a change -------------------------------------------------------------------------------

INPUTS = (
    rule("FP8", structure=["attention-input", "mlp-output"], optional=True),
    rule("NVFP4", structure=["mlp-input", "attention-output"], optional=True),
)


def decisions(graph: Graph) -> list[tuple[object, ...]]:
    """What is observed where, names of modules aside."""
    found = [(node, get(node, Observer)) for node in graph.nodes]
    return [
        (o.kind, o.spec, o.purpose, o.id if o.purpose == "input" else None, len(o.consumers), value(node).dim())
        for node, o in found
        if o is not None
    ]


@pytest.mark.parametrize("model_type", ["phi", "mixtral"])
def test_renamed_modules_are_observed_alike(model_type: str) -> None:
    """Keys and values apart, which only a model that runs shows: those are found alike in tests/capture."""
    graph = run(model_type, assign(*INPUTS), "insert-observers").graph
    other = run(renamed(captured(model_type), seed=1), assign(*INPUTS), "insert-observers").graph
    assert decisions(other) == decisions(graph)
    assert decisions(graph)


@cache
def twin(model_type: str) -> PreTrainedModel:
    return build_twin(tiny_config(model_type))


def logits(graph: Graph, model_type: str, seen: list[Tensor]) -> Tensor:
    """The logits of a graph with the weights of a twin; what its observers see goes to `seen`."""
    model = twin(model_type)
    ids = torch.arange(3, 29).reshape(2, 13)

    def handle(node: fx.Node, args: tuple[Any, ...]) -> Any:
        seen.append(args[0])
        return args[0]

    tensors = {**graph.constants, **dict(model.named_parameters(remove_duplicate=False)), **graph.buffers}
    with torch.no_grad():
        values = evaluate(
            [node for node in graph.nodes if node.op not in ("placeholder", "output")],
            {graph.input: ids},
            root=graph.model,
            tensors=tensors | {k: v for k, v in model.named_buffers() if k not in tensors},
            device=ids.device,
            keep=[graph.output],
            handlers={observe: handle},
        )
    result: Tensor = values[graph.output]
    return result


SCHEMES = st.sampled_from([None, "FP8", "NVFP4", "W8A8"])


@pytest.mark.parametrize("model_type", ["llama", "phi", "mixtral", "gemma3n_text"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_no_pass_before_lowering_changes_the_output(model_type: str, data: st.DataObject) -> None:
    structures = ["attention-input", "attention-output", "mlp-input", "mlp-output", "lm-head"]
    rules = [rule(data.draw(SCHEMES), structure=structure, optional=True) for structure in structures]
    cache = data.draw(st.sampled_from([None, {"strategy": "tensor"}, {"strategy": "attn_head"}]))
    item = assign(*rules, kv_cache=cache, on_indivisible="dense")
    observed = run(model_type, item, "insert-observers").graph
    seen: list[Tensor] = []
    assert torch.equal(logits(observed, model_type, seen), logits(captured(model_type), model_type, []))
    assert len(seen) == sum(node.target is observe for node in observed.nodes)
