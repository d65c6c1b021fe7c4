"""Observers: what must be measured is measured, once, and what is measured is used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import replace

from qcompiler.ir.annotations import (
    AnyObserver,
    HessianObserver,
    Leaf,
    LeafKind,
    Observer,
    Quant,
    Role,
    get,
    get_quant,
    observed,
    scheme_of,
)
from qcompiler.ir.fx import Node, is_tensor, tensor_arg
from qcompiler.ir.graph import Graph
from qcompiler.ir.observers import observers
from qcompiler.ir.ops import observe
from qcompiler.ir.rules.rule import Broken, Rule, each
from qcompiler.scheme import Scheme
from qcompiler.solvers.options import NEED_HESSIAN


def needs_statistics(scheme: Scheme | None) -> bool:
    """Whether a scheme's input activations carry a number that must be measured on data."""
    return scheme is not None and scheme.input_activations is not None and scheme.input_activations.dynamic is not True


def needs_data(quant: Quant) -> bool:
    """Whether a decision may need statistics of any kind: of activations, for its solver or for its transform."""
    return needs_statistics(quant.scheme) or quant.solver in NEED_HESSIAN or quant.transform is not None


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
    if isinstance(found, Observer) and found.kind == "mse" and found.spec.is_nvfp4:
        return "it collects mse for nvfp4, whose global scale has no range of least error: collect minmax"
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
    """One id is one statistic, whose users each of its observers names: they read what all of them saw."""
    first: dict[str, AnyObserver] = {}
    for node in graph.nodes:
        observer = observed(node)
        if observer is None:
            continue
        other = first.setdefault(observer.id, observer)
        if type(other) is not type(observer) or replace(other, because=()) != replace(observer, because=()):
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


OBSERVERS = (
    each("has-disk-form", _has_disk_form),
    each("observe-annotated", _observe_annotated),
    each("observe-reads-tensor", _observe_reads_tensor),
    each("statistics-observed", _statistics_observed),
    each("hessian-observed", _hessian_observed),
    Rule("observer-shared", _observer_shared),
    Rule("observer-consistent", _observer_consistent),
    Rule("cache-observed", _cache_observed),
)
