"""What must hold of a graph at each stage. The pass manager checks it after every pass.

A spec is a table of rules: a name, and what finds the nodes that break it, with the words for it. Stages add rules; a
rule of an earlier stage holds on unless the table of a later one leaves it out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from qcompiler.errors import VerificationError
from qcompiler.ir.annotations import (
    HessianObserver,
    Leaf,
    LeafKind,
    Observer,
    Quant,
    Role,
    Scope,
    get,
    get_quant,
    observed,
    scheme_of,
)
from qcompiler.ir.fx import Node, is_operator, is_tensor, op_name, tensor_arg
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.observers import observers
from qcompiler.ir.ops import OPS, fake_quantize, fake_quantize_cache, observe, quantized_linear
from qcompiler.ir.printer import Printer
from qcompiler.scheme import Scheme
from qcompiler.solvers.options import NEED_HESSIAN

Broken = Iterator[tuple[Node, str]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition on graphs: `broken` finds the nodes at which it does not hold, and says what is wrong with each."""

    name: str
    broken: Callable[[Graph], Broken]


def _each(name: str, wrong: Callable[[Node], str | None]) -> Rule:
    """A rule on nodes, one by one: `wrong` says what is wrong with a node, or None."""

    def broken(graph: Graph) -> Broken:
        return ((node, said) for node in graph.nodes if (said := wrong(node)) is not None)

    return Rule(name, broken)


def needs_statistics(scheme: Scheme | None) -> bool:
    """Whether a scheme's input activations carry a number that must be measured on data."""
    return scheme is not None and scheme.input_activations is not None and scheme.input_activations.dynamic is not True


# --- any stage ------------------------------------------------------------------------------------------------------


def _known_operation(node: Node) -> str | None:
    if node.op not in ("placeholder", "get_attr", "call_module", "call_function", "output"):
        return f"a node of kind {node.op} has no meaning in a captured graph"
    if node.op == "call_function" and not is_operator(node) and node.target not in OPS.values():
        return f"it calls {op_name(node)}, which is neither an operator of torch nor one of {', '.join(OPS)}"
    return None


def _reads_earlier(graph: Graph) -> Broken:
    before: set[Node] = set()
    for node in graph.nodes:
        late = next((source for source in node.all_input_nodes if source not in before), None)
        if late is not None:
            yield node, f"it reads {Printer(graph).name(late)}, which does not stand before it"
        before.add(node)


def _returns_logits(graph: Graph) -> Broken:
    last = graph.nodes[-1]
    if last.op != "output":
        yield last, "the last node is not the output, so the graph returns nothing"
    for node in graph.nodes:
        if node.op == "output" and node is not last:
            yield node, "the graph has a second output"
    if last.op == "output" and len(last.all_input_nodes) != 1:
        yield last, f"the graph returns {len(last.all_input_nodes)} values, and not the logits alone"


def _leaf_annotated(node: Node) -> str | None:
    if node.op == "call_module" and (get(node, Leaf) is None or get(node, Role) is None):
        return "a called module has no Leaf and Role annotation, so no pass knows what it is"
    return None


def _annotated_leaf(node: Node) -> str | None:
    found = {"Role": get(node, Role), "Quant": get(node, Quant)}
    stray = [name for name, annotation in found.items() if annotation is not None]
    return f"it has a {' and a '.join(stray)} annotation, but is no leaf" if stray and get(node, Leaf) is None else None


def _module_exists(graph: Graph) -> Broken:
    known = {path for path, _ in graph.model.named_modules()}
    for node, leaf in graph.leaves():
        if leaf.path not in known:
            yield node, f"the model has no module {leaf.path!r}"
        elif node.op == "call_module" and node.target != leaf.path:
            yield node, f"it calls {node.target!r}, but its Leaf annotation is that of {leaf.path!r}"


def _no_quant(node: Node) -> str | None:
    return "it is annotated with a scheme, but no pass has assigned one" if get_quant(node) else None


def _no_inserted(node: Node) -> str | None:
    return f"{node.name} is an inserted operation" if node.target in OPS.values() else None


# --- once schemes are assigned --------------------------------------------------------------------------------------


def _quant_on_linear(node: Node) -> str | None:
    leaf = get(node, Leaf)
    if get_quant(node) and leaf is not None and not leaf.is_linear:
        return f"only linears are quantized, and this is a {leaf.kind}"
    return None


def _quant_has_because(node: Node) -> str | None:
    quant = get_quant(node)
    return "it does not say which pass and rule decided its scheme" if quant and not quant.because else None


def _quant_has_solver(node: Node) -> str | None:
    quant = get_quant(node)
    if quant and quant.scheme and quant.solver in ("", "none"):
        return "it has a scheme, but no solver that rounds its weight"
    if quant and not quant.scheme and quant.solver != "none":
        return f"it stays dense, but solver {quant.solver!r} is to round its weight"
    return None


def _alike(key: Callable[[Node, Leaf], Hashable], what: str) -> Callable[[Graph], Broken]:
    """Linears with one key (None: no matter) must have one scheme."""

    def broken(graph: Graph) -> Broken:
        first: dict[Hashable, Node] = {}
        for node, leaf in graph.linears():
            group = key(node, leaf)
            if group is None:
                continue
            other = first.setdefault(group, node)
            if scheme_of(other) != scheme_of(node):
                at = Printer(graph).name(other)
                yield node, f"{what} {group}: {_said(node)} here, but {_said(other)} at {at}"

    return broken


def _said(node: Node) -> str:
    scheme = scheme_of(node)
    return scheme.short if scheme else "dense"


def _fusion_group(node: Node, leaf: Leaf) -> str | None:
    role = get(node, Role)
    return role.fusion_group if role else None


# --- once observers stand -------------------------------------------------------------------------------------------


def _has_disk_form(node: Node) -> str | None:
    leaf = get(node, Leaf)
    if leaf is not None and leaf.kind is LeafKind.CONV1D and scheme_of(node):
        return "a Conv1D has no form in a checkpoint: run legalize before this pass"
    return None


def _observe_annotated(node: Node) -> str | None:
    found = observed(node)
    if node.target is observe and found is None:
        return "an observe node does not say what it collects"
    if found is not None and node.target is not observe:
        return f"an {type(found).__name__} annotation stands on a node that observes nothing"
    return None


def _observe_reads_tensor(node: Node) -> str | None:
    if node.target is observe:
        source = tensor_arg(node, 0)
        if source is None or not is_tensor(source):
            return "it observes something that is no tensor"
    return None


def _statistics_observed(node: Node) -> str | None:
    leaf, scheme = get(node, Leaf), scheme_of(node)
    if leaf is None or scheme is None or not needs_statistics(scheme):
        return None
    source = tensor_arg(node, 0)
    observer = get(source, Observer) if source is not None else None
    if observer is None or leaf.path not in observer.consumers:
        return "its input scale must be measured on data, and no observer stands before it"
    if observer.spec != scheme.input_activations:
        return f"its input is {_short(scheme)}, but the observer before it measures {observer.spec.short}"
    return None


def _hessian_observed(node: Node) -> str | None:
    quant = get_quant(node)
    if get(node, Leaf) is None or quant is None or quant.scheme is None or quant.solver not in NEED_HESSIAN:
        return None
    if any(isinstance(observer, HessianObserver) for observer in observers(node)):
        return None
    return f"solver {quant.solver} needs the Hessian of its inputs, and no observer before it collects one"


def _short(scheme: Scheme) -> str:
    return scheme.input_activations.short if scheme.input_activations else "left alone"


def _observer_shared(graph: Graph) -> Broken:
    """Linears of one input group and one input scheme, and all calls of one module, have one statistic."""
    first: dict[Hashable, tuple[Observer, Leaf]] = {}
    for node, leaf in graph.linears():
        role, scheme, source = get(node, Role), scheme_of(node), tensor_arg(node, 0)
        observer = get(source, Observer) if source is not None else None
        if role is None or role.input_group is None or scheme is None or observer is None:
            continue
        for key in ((role.input_group, scheme.input_activations), leaf.path):
            other, other_leaf = first.setdefault(key, (observer, leaf))
            if other.id != observer.id:
                shared = "is another call of" if key == leaf.path else "reads the same tensor as"
                yield (
                    node,
                    f"it {shared} {other_leaf.path}, but their scales come from two statistics: "
                    f"{observer.id} and {other.id}",
                )


def _observer_consistent(graph: Graph) -> Broken:
    """One id is one statistic."""
    first: dict[str, Observer] = {}
    for node in graph.nodes:
        observer = get(node, Observer)
        if observer is None:
            continue
        other = first.setdefault(observer.id, observer)
        if (other.kind, other.spec, other.purpose) != (observer.kind, observer.spec, observer.purpose):
            yield node, f"two different observers share the id {observer.id!r}"


def _cache_observed(graph: Graph) -> Broken:
    if graph.kv_cache is None:
        return
    seen: dict[str, dict[str, Node]] = defaultdict(dict)
    for node in graph.nodes:
        observer = get(node, Observer)
        if observer is not None and observer.purpose != "input":
            seen[observer.consumers[0]][observer.purpose] = node
    if not seen:
        yield graph.nodes[-1], "the KV cache is quantized, but no keys and values are observed"
    for path, purposes in seen.items():
        if len(purposes) == 1:
            ((purpose, node),) = purposes.items()
            yield node, f"of {path}, the {purpose} is observed alone: a cache needs a scale for keys and one for values"


# --- lowered --------------------------------------------------------------------------------------------------------


def _no_observe(node: Node) -> str | None:
    return "an observe node is left after lowering" if node.target is observe else None


def _linears_lowered(node: Node) -> str | None:
    return "a linear with a scheme was not lowered" if node.op == "call_module" and scheme_of(node) else None


def _names_cache(graph: Graph) -> Broken:
    known = {path for path, _ in graph.model.named_modules()}
    for node in graph.nodes:
        if node.target is fake_quantize_cache:
            named = len(node.args) == 3 and node.args[1] in known and node.args[2] in ("key", "value")
            if not named:
                yield node, "it does not name the attention and the part (key or value) whose scale it uses"
            elif graph.kv_cache is None:
                yield node, "it rounds a KV cache that is not quantized"


def _cache_rounded(graph: Graph) -> Broken:
    if graph.kv_cache is not None and not any(node.target is fake_quantize_cache for node in graph.nodes):
        yield graph.nodes[-1], "the KV cache is quantized, but nothing rounds keys and values"


def _names_layer(node: Node) -> str | None:
    if node.target not in (fake_quantize, quantized_linear):
        return None
    if not (len(node.args) == 2 and isinstance(node.args[1], str)):
        return "it does not name the layer whose numbers it uses"
    if node.target is fake_quantize:
        strange = next((user for user in node.users if user.args[1:] != node.args[1:]), None)
        return f"it rounds the input of {node.args[1]}, but {_called(strange)} reads it" if strange else None
    leaf = get(node, Leaf)
    if leaf is None or leaf.path != node.args[1] or not scheme_of(node):
        return f"it uses the numbers of {node.args[1]}, but its annotations do not give that layer a scheme"
    return None


def _called(node: Node) -> str:
    leaf = get(node, Leaf)
    return leaf.path if leaf is not None else f"%{node.name}"


def _input_rounded(node: Node) -> str | None:
    scheme, source = scheme_of(node), tensor_arg(node, 0)
    if node.target is not quantized_linear or scheme is None or source is None:
        return None
    rounded = source.target is fake_quantize
    if scheme.input_activations is not None and not rounded:
        return f"its input is {_short(scheme)}, but no fake_quantize stands before it"
    if scheme.input_activations is None and rounded:
        return "its input is left alone, but a fake_quantize stands before it"
    return None


# --- the tables -----------------------------------------------------------------------------------------------------

_ALWAYS = (
    _each("known-operation", _known_operation),
    Rule("reads-earlier-nodes", _reads_earlier),
    Rule("returns-logits", _returns_logits),
    _each("leaf-annotated", _leaf_annotated),
    _each("annotated-leaf", _annotated_leaf),
    Rule("module-exists", _module_exists),
)
_ASSIGNED = (
    *_ALWAYS,
    _each("quant-on-linear", _quant_on_linear),
    _each("quant-has-because", _quant_has_because),
    _each("quant-has-solver", _quant_has_solver),
    Rule("one-scheme-per-module", _alike(lambda node, leaf: leaf.path, "module")),
    Rule("one-scheme-per-fusion-group", _alike(_fusion_group, "fusion group")),
)
_WATCHED = (
    *_ASSIGNED,
    _each("has-disk-form", _has_disk_form),
    _each("observe-annotated", _observe_annotated),
    _each("observe-reads-tensor", _observe_reads_tensor),
    _each("statistics-observed", _statistics_observed),
    _each("hessian-observed", _hessian_observed),
    Rule("observer-shared", _observer_shared),
    Rule("observer-consistent", _observer_consistent),
    Rule("cache-observed", _cache_observed),
)

SPECS: dict[Stage, tuple[Rule, ...]] = {
    Stage.CAPTURED: (*_ALWAYS, _each("no-quant", _no_quant), _each("no-inserted-operation", _no_inserted)),
    Stage.ANNOTATED: (*_ASSIGNED, _each("no-inserted-operation", _no_inserted)),
    Stage.OBSERVED: _WATCHED,
    Stage.CALIBRATED: _WATCHED,
    Stage.LOWERED: (
        *_ASSIGNED,
        _each("no-observe", _no_observe),
        _each("linears-lowered", _linears_lowered),
        _each("names-layer", _names_layer),
        Rule("names-cache", _names_cache),
        Rule("cache-rounded", _cache_rounded),
        _each("input-rounded", _input_rounded),
    ),
}


def verify(graph: Graph, *, after: str) -> None:
    """Check a graph against the spec of its stage.

    Raises `VerificationError` for the first broken rule: it names the pass (`after`), the node, its module path, and
    shows the lines of IR around it.
    """
    for rule in SPECS[graph.stage]:
        for node, wrong in rule.broken(graph):
            raise VerificationError(_explain(graph, rule, node, wrong, after))


def _explain(graph: Graph, rule: Rule, node: Node, wrong: str, after: str) -> str:
    nodes, printer = graph.nodes, Printer(graph)
    index = nodes.index(node)
    lines = (f"  {'>' if n is node else ' '} {printer.line(n)}" for n in nodes[max(index - 3, 0) : index + 4])
    return (
        f"after {after}, the {graph.stage} graph breaks rule {rule.name} at {printer.name(node)}{_module(node)}: "
        f"{wrong}\n" + "\n".join(lines)
    )


def _module(node: Node) -> str:
    """The module that a node is, or that it was traced in."""
    leaf, scope = get(node, Leaf), get(node, Scope)
    if leaf is not None:
        return f" (module {leaf.path})"
    return f" (in module {scope.calls[-1][1] or 'the model itself'})" if scope and scope.calls else ""
