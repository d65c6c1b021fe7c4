"""Insert observers where a scheme needs numbers that only data can give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from qcompiler.errors import LegalityError
from qcompiler.ir.annotations import Leaf, Observer, Role, Scope, annotate, get_quant, need
from qcompiler.ir.fx import Node, is_op, tensor_arg
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.ops import observe
from qcompiler.ir.partition import partitions
from qcompiler.ir.spec import needs_statistics
from qcompiler.patterns.transformer import FUSED_ATTENTION
from qcompiler.pipeline import Context
from qcompiler.pipeline.base import GraphPass
from qcompiler.scheme import KVCacheSpec, QuantSpec, Strategy

Kind = Literal["minmax", "mse", "percentile"]


@dataclass(frozen=True, kw_only=True)
class InsertObservers(GraphPass):
    """Put an `observe` node before linears whose input scale is static, and on keys and values of a quantized cache.

    Linears that read one tensor with one scheme share one observer, so q, k and v get equal scales as their fusion
    needs; a module that runs several times has one statistic of all its inputs. `inputs` and `kv_cache` choose the
    statistic: the whole range, the range of least squared error, or a percentile of it.
    """

    name: ClassVar[str] = "insert-observers"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    ensures: ClassVar[Stage] = Stage.OBSERVED

    inputs: Kind = "minmax"
    kv_cache: Literal["minmax"] = "minmax"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99

    def run(self, graph: Graph, context: Context) -> None:
        self._observe_inputs(graph)
        if graph.kv_cache is not None:
            self._observe_cache(graph, graph.kv_cache)
        _check_partitions(graph)

    def _observe_inputs(self, graph: Graph) -> None:
        watched: dict[tuple[Node, QuantSpec], list[Node]] = {}
        for node, _ in graph.linears():
            quant = get_quant(node)
            if quant is None or quant.scheme is None or not needs_statistics(quant.scheme):
                continue
            source = tensor_arg(node, 0)
            assert source is not None
            assert quant.scheme.input_activations is not None
            watched.setdefault((source, quant.scheme.input_activations), []).append(node)
        ids: dict[str, str] = {}  # by module: its calls share one
        for (source, spec), readers in watched.items():
            paths = tuple(need(node, Leaf).path for node in readers)
            group = need(readers[0], Role).input_group
            id_ = next((ids[path] for path in paths if path in ids), f"{group}.{spec.short}")
            ids |= dict.fromkeys(paths, id_)
            because = f"{self.name}: the input scale of {spec.short} is measured"
            observer = Observer(id_, self.inputs, spec, "input", paths, (because,), self.percentile)
            observed = _insert(graph, source, observer, before=readers[0])
            for reader in readers:
                reader.replace_input_with(source, observed)

    def _observe_cache(self, graph: Graph, spec: KVCacheSpec) -> None:
        strategy = Strategy.ATTN_HEAD if spec.strategy == "attn_head" else Strategy.TENSOR
        numbers = QuantSpec(type="float", bits=8, strategy=strategy)
        because = f"{self.name}: the KV cache is quantized to fp8 per {spec.strategy}"
        attentions = list(FUSED_ATTENTION.matches(graph))
        if not attentions:
            raise LegalityError(
                "the KV cache cannot be quantized: the model has no attention operation to observe keys and values at",
                hint="remove kv_cache from assign",
            )
        for match in attentions:
            attention = match.anchor
            path = need(attention, Scope).calls[-1][1]
            for purpose, operand in (("key", 1), ("value", 2)):
                source = _before_repeat(tensor_arg(attention, operand))
                kind: Literal["key", "value"] = "key" if purpose == "key" else "value"
                observer = Observer(f"{path}.{kind}", self.kv_cache, numbers, kind, (path,), (because,))
                first = next(iter(source.users))
                observed = _insert(graph, source, observer, before=first)
                for user in [u for u in source.users if u is not observed]:
                    user.replace_input_with(source, observed)


def _check_partitions(graph: Graph) -> None:
    """Calibration sees one partition at a time, so what one statistic takes in must lie in one."""
    observers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.target is observe:
            observers.setdefault(need(node, Observer).id, []).append(node)
    if all(len(nodes) == 1 for nodes in observers.values()):
        return
    place = {node: part.name for part in partitions(graph) for node in part.nodes}
    for nodes in observers.values():
        names = dict.fromkeys(place[node] for node in nodes)
        if len(names) > 1:
            observer = need(nodes[0], Observer)
            raise LegalityError(
                f"{observer.consumers[0]} runs in several partitions ({', '.join(names)}): no static scale of its "
                f"{observer.purpose} can be measured, because calibration sees one partition at a time",
                hint="use a scheme whose activations are dynamic, or ignore this layer"
                if observer.purpose == "input"
                else "remove kv_cache from assign",
            )


def _insert(graph: Graph, source: Node, observer: Observer, *, before: Node) -> Node:
    with graph.fx.inserting_before(before):
        node = graph.fx.call_function(observe, (source,))
    node.meta = {key: value for key, value in source.meta.items() if key in ("val", "tensor_meta")}
    annotate(node, need(before, Scope))
    annotate(node, observer)
    return node


def _before_repeat(node: Node | None) -> Node:
    """Keys and values as they enter the cache: before grouped-query attention repeats the heads."""
    assert node is not None
    while is_op(node, "aten.reshape", "aten.expand", "aten.unsqueeze", "aten.clone", "aten.repeat_interleave"):
        below = tensor_arg(node, 0)
        assert below is not None
        node = below
    return node
