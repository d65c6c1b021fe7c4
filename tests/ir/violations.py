"""Every way to break the rules of a stage: one edit of a legal graph each, and what the verifier says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx

from qcompiler.ir.annotations import Leaf, LeafKind, Observer, Quant, Role, annotate, need
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.ops import fake_quantize, fake_quantize_cache, observe
from qcompiler.ir.spec import SPECS
from qcompiler.scheme import QuantSpec, Scheme, Strategy, preset
from tests.ir.graphs import again, insert, leaf, observers, op, reobserve, requant, without

LAYER = "model.layers.0"
Q, K, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qko")
GATE, DOWN, HEAD, NORM = f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.down_proj", "lm_head", f"{LAYER}.input_layernorm"
ACTIVATION = f"(in module {LAYER}.mlp.act_fn)"


@dataclass(frozen=True, slots=True)
class Case:
    """One way to break `rule` and nothing else: `edit` does it and returns the node that is to blame.

    The message ends in `module` and `says`.
    """

    name: str
    rule: str
    module: str
    says: str
    stages: tuple[Stage, ...]
    edit: Callable[[Graph], fx.Node]


CASES: list[Case] = []


def breaks(
    rule: str, says: str, *, module: str, since: Stage = Stage.CAPTURED
) -> Callable[[Callable[[Graph], fx.Node]], Callable[[Graph], fx.Node]]:
    """Register an edit as a case, at every stage that has this rule (`since`: from that stage on)."""
    stages = tuple(stage for stage, rules in SPECS.items() if stage >= since and rule in {r.name for r in rules})

    def register(edit: Callable[[Graph], fx.Node]) -> Callable[[Graph], fx.Node]:
        CASES.append(Case(edit.__name__, rule, module, says, stages, edit))
        return edit

    return register


DENSE = Quant(None, "none", ("test",))
OTHER_WEIGHTS = Scheme(
    weights=QuantSpec(type="float", bits=8, strategy=Strategy.CHANNEL),
    input_activations=preset("FP8").input_activations,
)


# --- any stage --------------------------------------------------------------------------------------------------------


@breaks("known-operation", "a node of kind call_method has no meaning in a captured graph", module=ACTIVATION)
def a_method_is_called(graph: Graph) -> fx.Node:
    node = op(graph, "silu")
    node.op, node.target = "call_method", "relu"
    return node


@breaks(
    "known-operation",
    "it calls double, which is neither an operator of torch nor one of observe, fake_quantize, fake_quantize_cache, "
    "quantized_linear",
    module=ACTIVATION,
)
def a_function_of_no_meaning_is_called(graph: Graph) -> fx.Node:
    def double(x: object) -> object:
        return x

    silu = op(graph, "silu")
    return insert(graph, double, silu.args[0], like=silu)


@breaks("reads-earlier-nodes", "it reads %model.norm, which does not stand before it", module=f"(module {DOWN})")
def a_linear_reads_what_comes_later(graph: Graph) -> fx.Node:
    node = leaf(graph, DOWN)
    node.args = (leaf(graph, "model.norm"), *node.args[1:])
    return node


@breaks("returns-logits", "the last node is not the output, so the graph returns nothing", module=f"(module {HEAD})")
def nothing_is_returned(graph: Graph) -> fx.Node:
    graph.fx.erase_node(graph.nodes[-1])
    return graph.nodes[-1]


@breaks("returns-logits", "the graph has a second output", module="")
def there_are_two_outputs(graph: Graph) -> fx.Node:
    with graph.fx.inserting_after(op(graph, "silu")):
        return graph.fx.create_node("output", "output", (op(graph, "silu"),))


@breaks("returns-logits", "the graph returns 2 values, and not the logits alone", module="")
def two_values_are_returned(graph: Graph) -> fx.Node:
    output = graph.nodes[-1]
    output.args = ((graph.output, leaf(graph, DOWN)),)
    return output


UNKNOWN = "a called module has no Leaf and Role annotation, so no pass knows what it is"


@breaks("leaf-annotated", UNKNOWN, module=f"(in module {NORM})")
def a_module_is_called_without_annotations(graph: Graph) -> fx.Node:
    node = leaf(graph, NORM)
    without(node, Leaf, Role)
    return node


@breaks("leaf-annotated", UNKNOWN, module=f"(module {NORM})")
def a_leaf_has_no_role(graph: Graph) -> fx.Node:
    node = leaf(graph, NORM)
    without(node, Role)
    return node


@breaks("annotated-leaf", "it has a Role annotation, but is no leaf", module=ACTIVATION)
def an_operation_has_a_role(graph: Graph) -> fx.Node:
    node = op(graph, "silu")
    annotate(node, Role(None, 0, None, None, "test"))
    return node


@breaks("annotated-leaf", "it has a Quant annotation, but is no leaf", module=ACTIVATION, since=Stage.ANNOTATED)
def an_operation_has_a_scheme(graph: Graph) -> fx.Node:
    return requant(op(graph, "silu"), DENSE)


@breaks("module-exists", "the model has no module 'model.gone'", module="(module model.gone)")
def a_module_is_gone(graph: Graph) -> fx.Node:
    node = leaf(graph, NORM)
    annotate(node, replace(need(node, Leaf), path="model.gone"), replacing=need(node, Leaf))
    node.target = "model.gone"
    return node


@breaks(
    "module-exists", f"it calls 'model.norm', but its Leaf annotation is that of {NORM!r}", module=f"(module {NORM})"
)
def another_module_is_called(graph: Graph) -> fx.Node:
    node = leaf(graph, NORM)
    node.target = "model.norm"
    return node


# --- before schemes are assigned, and before observers stand ----------------------------------------------------------


@breaks("no-quant", "it is annotated with a scheme, but no pass has assigned one", module=f"(module {Q})")
def a_captured_linear_has_a_scheme(graph: Graph) -> fx.Node:
    return requant(leaf(graph, Q), DENSE)


@breaks("no-inserted-operation", "observe is an inserted operation", module=f"(in module {Q})")
def an_observer_stands_too_early(graph: Graph) -> fx.Node:
    return insert(graph, observe, leaf(graph, NORM), like=leaf(graph, Q))


# --- once schemes are assigned ----------------------------------------------------------------------------------------


@breaks("quant-on-linear", "only linears are quantized, and this is a norm", module=f"(module {NORM})")
def a_norm_has_a_scheme(graph: Graph) -> fx.Node:
    return requant(leaf(graph, NORM), DENSE)


@breaks("quant-has-because", "it does not say which pass and rule decided its scheme", module=f"(module {OUT})")
def a_scheme_has_no_reason(graph: Graph) -> fx.Node:
    node = leaf(graph, OUT)
    return requant(node, replace(need(node, Quant), because=()))


@breaks("quant-has-solver", "it has a scheme, but no solver that rounds its weight", module=f"(module {OUT})")
def a_scheme_has_no_solver(graph: Graph) -> fx.Node:
    node = leaf(graph, OUT)
    return requant(node, replace(need(node, Quant), solver="none"))


@breaks("quant-has-solver", "it stays dense, but solver 'rtn' is to round its weight", module=f"(module {HEAD})")
def a_dense_linear_has_a_solver(graph: Graph) -> fx.Node:
    return requant(leaf(graph, HEAD), replace(DENSE, solver="rtn"))


@breaks(
    "one-scheme-per-module",
    f"module {OUT}: w:fp8/channel a:fp8/tensor here, but w:fp8/tensor a:fp8/tensor at %l0.self_attn.o_proj",
    module=f"(module {OUT})",
)
def a_module_runs_twice_under_two_schemes(graph: Graph) -> fx.Node:
    node = again(graph, leaf(graph, OUT))
    return requant(node, replace(need(node, Quant), scheme=OTHER_WEIGHTS))


@breaks(
    "one-scheme-per-fusion-group",
    "fusion group l0.qkv: w:fp8/channel a:fp8/tensor here, but w:fp8/tensor a:fp8/tensor at %l0.self_attn.q_proj",
    module=f"(module {K})",
)
def fused_linears_have_two_schemes(graph: Graph) -> fx.Node:
    node = leaf(graph, K)
    return requant(node, replace(need(node, Quant), scheme=OTHER_WEIGHTS))


# --- once observers stand ---------------------------------------------------------------------------------------------


@breaks(
    "has-disk-form",
    "a Conv1D has no form in a checkpoint: run legalize before this pass",
    module=f"(module {DOWN})",
)
def a_conv1d_has_a_scheme(graph: Graph) -> fx.Node:
    node = leaf(graph, DOWN)
    annotate(node, replace(need(node, Leaf), kind=LeafKind.CONV1D), replacing=need(node, Leaf))
    return node


@breaks("observe-annotated", "an observe node does not say what it collects", module=f"(in module {GATE})")
def an_observer_collects_nothing(graph: Graph) -> fx.Node:
    gate = leaf(graph, GATE)
    return insert(graph, observe, gate.args[0], like=gate)


@breaks("observe-annotated", "an Observer annotation stands on a node that observes nothing", module=ACTIVATION)
def an_activation_claims_to_observe(graph: Graph) -> fx.Node:
    return reobserve(op(graph, "silu"), replace(need(observers(graph, "input")[0], Observer), id="test"))


@breaks("observe-reads-tensor", "it observes something that is no tensor", module=f"(in module {Q})")
def a_size_is_observed(graph: Graph) -> fx.Node:
    size = next(node for node in graph.nodes if node.name.startswith("sym_size"))
    node = insert(graph, observe, size, like=leaf(graph, Q))
    return reobserve(node, replace(need(observers(graph, "input")[0], Observer), id="test"))


NOT_OBSERVED = "its input scale must be measured on data, and no observer stands before it"


@breaks("statistics-observed", NOT_OBSERVED, module=f"(module {OUT})")
def a_static_input_is_not_observed(graph: Graph) -> fx.Node:
    node = leaf(graph, OUT)
    node.args = (node.args[0].args[0],)
    return node


@breaks("statistics-observed", NOT_OBSERVED, module=f"(module {OUT})")
def an_observer_works_for_others(graph: Graph) -> fx.Node:
    node = leaf(graph, OUT)
    before = need(node.args[0], Observer)
    reobserve(node.args[0], replace(before, consumers=(DOWN,)))
    return node


@breaks(
    "statistics-observed",
    "its input is fp8/tensor, but the observer before it measures int8/tensor",
    module=f"(module {OUT})",
)
def an_observer_measures_for_other_numbers(graph: Graph) -> fx.Node:
    node = leaf(graph, OUT)
    before = need(node.args[0], Observer)
    reobserve(node.args[0], replace(before, spec=QuantSpec(bits=8, strategy=Strategy.TENSOR)))
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
    reobserve(node.args[0], replace(need(shared, Observer), id="alone"))
    return node


@breaks(
    "observer-shared",
    f"it is another call of {OUT}, but their scales come from two statistics: alone and l0.attention-output.fp8/tensor",
    module=f"(module {OUT})",
)
def calls_of_one_module_are_observed_apart(graph: Graph) -> fx.Node:
    first = leaf(graph, OUT)
    node = again(graph, first)
    annotate(node, replace(need(node, Role), input_group="test"), replacing=need(node, Role))
    node.args = (insert(graph, observe, leaf(graph, NORM), like=node),)
    reobserve(node.args[0], replace(need(first.args[0], Observer), id="alone"))
    return node


@breaks(
    "observer-consistent",
    "two different observers share the id 'l0.attention-input.fp8/tensor'",
    module=f"(in module {OUT})",
)
def one_statistic_is_taken_in_two_ways(graph: Graph) -> fx.Node:
    first, second = observers(graph, "input")[:2]
    taken = need(first, Observer).id
    return reobserve(second, replace(need(second, Observer), id=taken, kind="percentile"))


@breaks("cache-observed", "the KV cache is quantized, but no keys and values are observed", module="")
def a_quantized_cache_is_not_observed(graph: Graph) -> fx.Node:
    for node in (*observers(graph, "key"), *observers(graph, "value")):
        node.replace_all_uses_with(node.args[0])
        graph.fx.erase_node(node)
    return graph.nodes[-1]


@breaks(
    "cache-observed",
    f"of {LAYER}.self_attn, the key is observed alone: a cache needs a scale for keys and one for values",
    module=f"(in module {LAYER}.self_attn)",
)
def keys_are_observed_without_values(graph: Graph) -> fx.Node:
    value = observers(graph, "value")[0]
    value.replace_all_uses_with(value.args[0])
    graph.fx.erase_node(value)
    return observers(graph, "key")[0]


# --- lowered ----------------------------------------------------------------------------------------------------------


@breaks("no-observe", "an observe node is left after lowering", module=f"(in module {Q})")
def an_observer_is_left(graph: Graph) -> fx.Node:
    return insert(graph, observe, leaf(graph, NORM), like=leaf(graph, Q))


@breaks("linears-lowered", "a linear with a scheme was not lowered", module=f"(module {HEAD})")
def a_linear_is_left(graph: Graph) -> fx.Node:
    return requant(leaf(graph, HEAD), replace(need(leaf(graph, OUT), Quant), because=("test",)))


@breaks("names-layer", "it does not name the layer whose numbers it uses", module=f"(module {DOWN})")
def a_quantized_linear_names_no_layer(graph: Graph) -> fx.Node:
    node = leaf(graph, DOWN)
    node.args = node.args[:1]
    return node


@breaks("names-layer", f"it rounds the input of {Q}, but {K} reads it", module=f"(in module {Q})")
def an_input_is_rounded_for_another_layer(graph: Graph) -> fx.Node:
    node = leaf(graph, K)
    node.args = (leaf(graph, Q).args[0], *node.args[1:])
    return node.args[0]


OTHERS_NUMBERS = "but its annotations do not give that layer a scheme"


@breaks("names-layer", f"it uses the numbers of {GATE}, {OTHERS_NUMBERS}", module=f"(module {DOWN})")
def a_quantized_linear_uses_anothers_numbers(graph: Graph) -> fx.Node:
    node = leaf(graph, DOWN)
    node.args = (node.args[0], GATE)
    return node


@breaks("names-layer", f"it uses the numbers of {DOWN}, {OTHERS_NUMBERS}", module=f"(module {DOWN})")
def a_quantized_linear_has_no_scheme(graph: Graph) -> fx.Node:
    return requant(leaf(graph, DOWN), DENSE)


@breaks("input-rounded", "its input is fp8/tensor, but no fake_quantize stands before it", module=f"(module {OUT})")
def a_quantized_input_is_not_rounded(graph: Graph) -> fx.Node:
    node = leaf(graph, OUT)
    node.args = (node.args[0].args[0], *node.args[1:])
    return node


@breaks("input-rounded", "its input is left alone, but a fake_quantize stands before it", module=f"(module {DOWN})")
def an_input_is_rounded_for_nothing(graph: Graph) -> fx.Node:
    node = leaf(graph, DOWN)
    node.args = (insert(graph, fake_quantize, node.args[0], DOWN, like=node), *node.args[1:])
    return node


@breaks(
    "names-cache",
    "it does not name the attention and the part (key or value) whose scale it uses",
    module=f"(in module {LAYER}.self_attn)",
)
def a_rounded_key_names_no_attention(graph: Graph) -> fx.Node:
    node = next(node for node in graph.nodes if node.target is fake_quantize_cache)
    node.args = (node.args[0], f"{LAYER}.attention", "key")
    return node


@breaks("names-cache", "it rounds a KV cache that is not quantized", module=f"(in module {LAYER}.self_attn)")
def a_cache_is_rounded_that_is_not_quantized(graph: Graph) -> fx.Node:
    graph.kv_cache = None
    return next(node for node in graph.nodes if node.target is fake_quantize_cache)


@breaks("cache-rounded", "the KV cache is quantized, but nothing rounds keys and values", module="")
def nothing_rounds_a_quantized_cache(graph: Graph) -> fx.Node:
    for node in graph.nodes:
        if node.target is fake_quantize_cache:
            node.replace_all_uses_with(node.args[0])
            graph.fx.erase_node(node)
    return graph.nodes[-1]


@breaks(
    "hessian-observed",
    "solver gptq needs the Hessian of its inputs, and no observer before it collects one",
    module=f"(module {DOWN})",
)
def a_solver_has_no_hessian(graph: Graph) -> fx.Node:
    node = leaf(graph, DOWN)
    return requant(node, replace(need(node, Quant), solver="gptq"))
