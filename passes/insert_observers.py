"""Insert observers where a scheme needs numbers that only data can give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import Field

from qcompiler.capture.cache import prove_cached
from qcompiler.errors import ConfigError
from qcompiler.ir.annotations import (
    ChannelObserver,
    HessianObserver,
    Leaf,
    Observer,
    Role,
    annotate,
    get_quant,
    need,
    scheme_of,
)
from qcompiler.ir.edit import insert, stand_between
from qcompiler.ir.fx import Node, tensor_arg
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.observers import as_one, check_partitions, unobserved
from qcompiler.ir.ops import observe
from qcompiler.ir.rules.observers import needs_statistics
from qcompiler.patterns.cache import cached_tensors
from qcompiler.patterns.place import place_transforms, rescales
from qcompiler.pipeline import Context
from qcompiler.pipeline.base import GraphPass
from qcompiler.report import Report
from qcompiler.scheme import KVCacheSpec, QuantSpec
from qcompiler.solvers.options import NEED_HESSIAN
from qcompiler.transforms.options import AwqOptions

Kind = Literal["minmax", "mse", "percentile"]
Collected = TypeVar("Collected", HessianObserver, ChannelObserver)
_NVFP4_WHOLE = "each group has a scale of its own, so a narrower global scale clips groups and refines none"


@dataclass(frozen=True, kw_only=True)
class InsertObservers(GraphPass):
    """Put an `observe` node before linears whose input scale is static, and on keys and values of a quantized cache.

    Linears that read one tensor with one scheme share one observer, so q, k and v get equal scales as their fusion
    needs; a module that runs several times has one statistic of all its inputs. `inputs` and `kv_cache` choose the
    statistic: the whole range, the range of least squared error (NVFP4's is the whole), or a percentile of it.
    `importance` also measures how large each input of every linear is, for `calibrate: {scales: importance}`.
    """

    name: ClassVar[str] = "insert-observers"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    ensures: ClassVar[Stage] = Stage.OBSERVED

    inputs: Kind = "minmax"
    kv_cache: Kind = "minmax"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    importance: bool = False

    def may_measure(self) -> bool:
        return self.importance

    def run(self, graph: Graph, context: Context) -> None:
        if graph.kv_cache is not None:
            prove_cached(graph, trust_remote_code=context.source.trust_remote_code)
        place_transforms(graph, context.report)
        self._observe_inputs(graph, context.report)
        quants = {node: quant for node, _ in graph.linears() if (quant := get_quant(node)) and quant.scheme}
        rescaled = self._rescaled(graph)
        hessians = {node: q.solver for node, q in quants.items() if q.solver in NEED_HESSIAN}
        hessians |= {
            n: name for n, name in rescaled.items() if n in quants and isinstance(quants[n].transform, AwqOptions)
        }
        channels = dict(rescaled)
        if self.importance:
            channels |= {node: "importance" for node in quants if node not in hessians and node not in channels}
        self._collect(graph, HessianObserver, hessians)
        self._collect(graph, ChannelObserver, channels)
        if graph.kv_cache is not None:
            self._observe_cache(graph, graph.kv_cache)
        check_partitions(graph)

    def _rescaled(self, graph: Graph) -> dict[Node, str]:
        """The linears whose inputs a transform rescales and that need to know it, with the transform's name."""
        names = {path: found.transform.name for found in rescales(graph.nodes) for path in found.consumers}
        asked = {path for found in rescales(graph.nodes) for path in found.asked}
        rescaled = {node: names[leaf.path] for node, leaf in graph.linears() if leaf.path in names}
        for node, name in list(rescaled.items()):
            path, scheme = need(node, Leaf).path, scheme_of(node)
            spec = scheme.input_activations if scheme is not None and needs_statistics(scheme) else None
            if spec is not None and self._kind(spec)[0] != "minmax":
                raise ConfigError(
                    f"{self.name}: the input of {path} is rescaled by {name}, after which its {self.inputs} range "
                    "would be unknown",
                    hint="say inputs: minmax, or use a scheme whose activations are dynamic",
                )
            if path not in asked and spec is None:
                del rescaled[node]
        return rescaled

    def _observe_inputs(self, graph: Graph, report: Report) -> None:
        watched: dict[tuple[Node, QuantSpec], list[Node]] = {}
        for node, _ in graph.linears():
            quant = get_quant(node)
            if quant is None or quant.scheme is None or not needs_statistics(quant.scheme):
                continue
            source = tensor_arg(node, 0)
            assert source is not None
            assert quant.scheme.input_activations is not None
            watched.setdefault((source, quant.scheme.input_activations), []).append(node)
        shared = as_one([_asked(readers, spec.short) for (_, spec), readers in watched.items()])
        for ((source, spec), readers), (id_, paths) in zip(watched.items(), shared, strict=True):
            kind, because = self._kind(spec)
            observer = Observer(id_, kind, spec, "input", paths, because, self.percentile)
            observed = insert(graph, observe, (source,), before=readers[0], like=source)
            annotate(observed, observer)
            for reader in readers:
                reader.replace_input_with(source, observed)
        if self.inputs == "mse" and any(spec.is_nvfp4 for _, spec in watched):
            report.fallback(f"{self.name}: minmax instead of mse for nvfp4 inputs: {_NVFP4_WHOLE}")

    def _kind(self, spec: QuantSpec) -> tuple[Kind, tuple[str, ...]]:
        """What is collected for inputs of this spec, and why."""
        because = f"{self.name}: the input scale of {spec.short} is measured"
        if self.inputs == "mse" and spec.is_nvfp4:
            return "minmax", (because, f"minmax instead of mse: {_NVFP4_WHOLE}")
        return self.inputs, (because,)

    def _collect(self, graph: Graph, kind: type[Collected], wanted: Mapping[Node, str]) -> None:
        """One statistic for all linears of `wanted` that read one tensor; the values are what needs it."""
        watched: dict[Node, list[Node]] = {}
        for node in wanted:
            watched.setdefault(unobserved(node), []).append(node)
        shared = as_one([_asked(linears, kind.what) for linears in watched.values()])
        for (source, linears), (id_, paths) in zip(watched.items(), shared, strict=True):
            because = f"{self.name}: {', '.join(sorted({wanted[node] for node in linears}))} needs it"
            readers = [user for user in source.users if user in linears or user.target is observe]
            collected = insert(graph, observe, (source,), before=_first(graph, readers), like=source)
            annotate(collected, kind(id_, paths, (because,)))
            for reader in readers:
                reader.replace_input_with(source, collected)

    def _observe_cache(self, graph: Graph, spec: KVCacheSpec) -> None:
        because = f"{self.name}: the KV cache is quantized to fp8 per {spec.strategy}"
        for cached in cached_tensors(graph):
            id_ = f"{cached.path}.{cached.part}"
            observed = stand_between(graph, cached.node, observe)
            paths = (cached.path,)
            observer = Observer(id_, self.kv_cache, spec.numbers, cached.part, paths, (because,), self.percentile)
            annotate(observed, observer)


def _asked(linears: Sequence[Node], what: str) -> tuple[str, tuple[str, ...]]:
    """A statistic of the tensor that these linears read: its id, and who uses it."""
    return f"{need(linears[0], Role).input_group}.{what}", tuple(need(node, Leaf).path for node in linears)


def _first(graph: Graph, nodes: list[Node]) -> Node:
    return next(node for node in graph.nodes if node in nodes)
