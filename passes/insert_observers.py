"""Insert observers where a scheme needs numbers that only data can give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompiler.errors import LegalityError
from qcompiler.ir.annotations import Leaf, Observer, Role, Scope, annotate, get_quant, need
from qcompiler.ir.fx import Node, tensor_arg
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.ops import observe
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
    needs. `inputs` and `kv_cache` choose the statistic: the whole range, the range of least squared error, or a
    percentile of it.
    """

    name: ClassVar[str] = "insert-observers"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    ensures: ClassVar[Stage] = Stage.OBSERVED

    inputs: Kind = "minmax"
    kv_cache: Literal["minmax"] = "minmax"
    percentile: float = 99.99

    def run(self, graph: Graph, context: Context) -> None:
        self._observe_inputs(graph)
        if graph.kv_cache is not None:
            self._observe_cache(graph, graph.kv_cache)

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
        for (source, spec), readers in watched.items():
            paths = tuple(need(node, Leaf).path for node in readers)
            group = need(readers[0], Role).input_group
            because = f"{self.name}: the input scale of {spec.short} is measured"
            observer = Observer(f"{group}.{spec.short}", self.inputs, spec, "input", paths, (because,), self.percentile)
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


def _insert(graph: Graph, source: Node, observer: Observer, *, before: Node) -> Node:
    with graph.fx.inserting_before(before):
        node = graph.fx.call_function(observe, (source,))
    node.meta = {key: value for key, value in source.meta.items() if key in ("val", "tensor_meta")}
    annotate(node, need(before, Scope))
    annotate(node, observer)
    return node


def _before_repeat(node: Node | None) -> Node:
    """Keys and values as they enter the cache: before grouped-query attention repeats the heads."""
    from qcompiler.ir.fx import is_op

    assert node is not None
    while is_op(node, "aten.reshape", "aten.expand", "aten.unsqueeze", "aten.clone", "aten.repeat_interleave"):
        below = tensor_arg(node, 0)
        assert below is not None
        node = below
    return node
