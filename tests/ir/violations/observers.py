"""Edits that break the rules of observers."""

from __future__ import annotations

from torch import fx

from qcompiler.ir.annotations import Leaf, LeafKind, Observer, Quant, Role, need
from qcompiler.ir.graph import Graph
from qcompiler.ir.ops import observe
from qcompiler.scheme import QuantSpec, Strategy, preset
from tests.ir.graphs import again, changed, erase, insert, leaf, observers, op
from tests.ir.violations.case import ACTIVATION, DOWN, GATE, LAYER, NORM, OUT, K, Q, breaks


@breaks(
    "has-disk-form",
    "a Conv1D has no form in a checkpoint: run legalize before this pass",
    module=f"(module {DOWN})",
)
def a_conv1d_has_a_scheme(graph: Graph) -> fx.Node:
    return changed(leaf(graph, DOWN), Leaf, kind=LeafKind.CONV1D)


@breaks("observe-annotated", "an observe node does not say what it collects", module=f"(in module {GATE})")
def an_observer_collects_nothing(graph: Graph) -> fx.Node:
    gate = leaf(graph, GATE)
    return insert(graph, observe, gate.args[0], like=gate)


@breaks("observe-annotated", "an Observer annotation stands on a node that observes nothing", module=ACTIVATION)
def an_activation_claims_to_observe(graph: Graph) -> fx.Node:
    return changed(op(graph, "silu"), Observer, like=observers(graph, "input")[0], id="test")


@breaks(
    "observe-annotated",
    "it collects mse for nvfp4, whose global scale has no range of least error: collect minmax",
    module=f"(in module {LAYER}.self_attn)",
)
def a_global_scale_of_least_error_is_asked_for(graph: Graph) -> fx.Node:
    return changed(observers(graph, "key")[0], Observer, kind="mse", spec=preset("NVFP4").input_activations)


@breaks("observe-reads-tensor", "it observes something that is no tensor", module=f"(in module {Q})")
def a_size_is_observed(graph: Graph) -> fx.Node:
    size = next(node for node in graph.nodes if node.name.startswith("sym_size"))
    node = insert(graph, observe, size, like=leaf(graph, Q))
    return changed(node, Observer, like=observers(graph, "input")[0], id="test")


NOT_OBSERVED = "its input scale must be measured on data, and no observer stands before it"


@breaks("statistics-observed", NOT_OBSERVED, module=f"(module {OUT})")
def a_static_input_is_not_observed(graph: Graph) -> fx.Node:
    node = leaf(graph, OUT)
    node.args = (node.args[0].args[0],)
    return node


@breaks("statistics-observed", NOT_OBSERVED, module=f"(module {OUT})")
def an_observer_works_for_others(graph: Graph) -> fx.Node:
    node = leaf(graph, OUT)
    changed(node.args[0], Observer, consumers=(DOWN,))
    return node


@breaks(
    "statistics-observed",
    "its input is fp8/tensor, but the observer before it measures int8/tensor",
    module=f"(module {OUT})",
)
def an_observer_measures_for_other_numbers(graph: Graph) -> fx.Node:
    node = leaf(graph, OUT)
    changed(node.args[0], Observer, spec=QuantSpec(bits=8, strategy=Strategy.TENSOR))
    return node


@breaks(
    "observer-shared",
    f"it reads the same tensor as {Q}, but their scales come from two statistics: "
    "alone and l0.attention-input.fp8/tensor",
    module=f"(module {K})",
)
def linears_of_one_input_are_observed_apart(graph: Graph) -> fx.Node:
    node = leaf(graph, K)
    shared = node.args[0]
    node.args = (insert(graph, observe, shared.args[0], like=node),)
    changed(node.args[0], Observer, like=shared, id="alone")
    return node


@breaks(
    "observer-shared",
    f"it is another call of {OUT}, but their scales come from two statistics: alone and l0.attention-output.fp8/tensor",
    module=f"(module {OUT})",
)
def calls_of_one_module_are_observed_apart(graph: Graph) -> fx.Node:
    first = leaf(graph, OUT)
    node = changed(again(graph, first), Role, input_group="test")
    node.args = (insert(graph, observe, leaf(graph, NORM), like=node),)
    changed(node.args[0], Observer, like=first.args[0], id="alone")
    return node


@breaks(
    "observer-consistent",
    "two different observers share the id 'l0.attention-input.fp8/tensor'",
    module=f"(in module {OUT})",
)
def one_statistic_is_taken_in_two_ways(graph: Graph) -> fx.Node:
    first, second = observers(graph, "input")[:2]
    return changed(second, Observer, id=need(first, Observer).id, kind="percentile")


@breaks(
    "observer-consistent",
    f"two different observers share the id '{LAYER}.self_attn.key'",
    module="(in module model.layers.1.self_attn)",
)
def one_statistic_has_two_percentiles(graph: Graph) -> fx.Node:
    first, second = observers(graph, "key")[:2]
    return changed(second, Observer, id=need(first, Observer).id, percentile=99.0)


@breaks(
    "observer-consistent",
    "two different observers share the id 'l0.attention-input.fp8/tensor'",
    module=f"(in module {OUT})",
)
def one_statistic_has_users_that_not_all_its_observers_name(graph: Graph) -> fx.Node:
    first, second = observers(graph, "input")[:2]
    return changed(second, Observer, like=first, consumers=need(second, Observer).consumers)


@breaks("cache-observed", "the KV cache is quantized, but no keys and values are observed", module="")
def a_quantized_cache_is_not_observed(graph: Graph) -> fx.Node:
    erase(graph, *observers(graph, "key"), *observers(graph, "value"))
    return graph.nodes[-1]


@breaks(
    "cache-observed",
    f"of {LAYER}.self_attn, the key is observed alone: a cache needs a scale for keys and one for values",
    module=f"(in module {LAYER}.self_attn)",
)
def keys_are_observed_without_values(graph: Graph) -> fx.Node:
    erase(graph, observers(graph, "value")[0])
    return observers(graph, "key")[0]


@breaks(
    "hessian-observed",
    "solver gptq needs the Hessian of its inputs, and no observer before it collects one",
    module=f"(module {DOWN})",
)
def a_solver_has_no_hessian(graph: Graph) -> fx.Node:
    return changed(leaf(graph, DOWN), Quant, solver="gptq")
