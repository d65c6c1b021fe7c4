"""Predict, without a weight, every tensor that a compilation will write: names of layers, bytes, bits per weight."""

from __future__ import annotations

from collections.abc import Iterable, Set

from torch import Tensor

from qcompiler.formats import cache_scale, layout
from qcompiler.ir.annotations import Leaf, LeafKind, Observer, Quant, Role, get, get_quant, need, scheme_of
from qcompiler.ir.fx import Node, value
from qcompiler.ir.graph import Graph
from qcompiler.lowering.sites import LISTED
from qcompiler.patterns.cache import cached_tensors
from qcompiler.patterns.place import rescales, runs_of, too_late
from qcompiler.report import LayerRow, Report
from qcompiler.scheme import KVCacheSpec
from qcompiler.source import ModelSource
from qcompiler.tensors import Spec, tensor_bytes


def quantized_paths(graph: Graph) -> dict[str, Node]:
    """The weights that are not written as they are, by parameter path, with the linear that each belongs to."""
    return {f"{leaf.path}.weight": node for node, leaf in graph.linears() if scheme_of(node) is not None}


def written_paths(graph: Graph, source: ModelSource) -> list[str]:
    """Every parameter and persistent buffer that is written dense, tied ones once."""
    quantized = quantized_paths(graph)
    state = source.model.state_dict(keep_vars=True)
    if source.has_weights:
        skip = set(source.names.aliases) | source.names.absent
        return [path for path in state if path not in quantized and path not in skip]
    seen: set[int] = set()
    kept: list[str] = []
    for path, tensor in state.items():
        if id(tensor) not in seen and path not in quantized:
            kept.append(path)
        seen.add(id(tensor))
    return kept


def disk_prefix(path: str, source: ModelSource) -> str:
    """Where a quantized module's tensors go. An embedding's tied head gets a name of its own, as it is tied no more."""
    weight = f"{path}.weight"
    name = weight if weight in source.names.aliases else source.names.disk_name(weight)
    assert name is not None, f"legalize let {path} pass without a name on disk"
    return name.removesuffix(".weight")


def written_specs(graph: Graph, source: ModelSource) -> dict[str, Spec]:
    """Key, dtype and shape of every tensor that an annotated graph will be written as."""
    specs = dict(source.names.dense_specs(written_paths(graph, source)))
    for path, node in quantized_paths(graph).items():
        prefix, leaf, scheme = disk_prefix(path.removesuffix(".weight"), source), need(node, Leaf), scheme_of(node)
        assert scheme is not None
        for name, spec in layout(scheme, leaf.out_features, leaf.in_features, source.dtype).items():
            specs[f"{prefix}.{name}"] = spec
    return specs if graph.kv_cache is None else specs | _cache_specs(graph, graph.kv_cache, source)


def dense_bytes(paths: Iterable[str], source: ModelSource) -> int:
    """Bytes of these parameters as they are written."""
    if source.has_weights:
        return sum(tensor_bytes(dtype, shape) for dtype, shape in source.names.dense_specs(paths).values())
    state = source.model.state_dict()
    return sum(tensor_bytes(state[path].dtype, tuple(state[path].shape)) for path in paths)


def predict(graph: Graph, source: ModelSource, report: Report) -> None:
    """Fill the report's layers and totals. Numbers are exact: they equal what `lower` writes, to the byte."""
    paths = written_paths(graph, source)
    written = frozenset(paths)
    rows: dict[str, LayerRow] = {}
    runs, moved = runs_of(graph), rescales(graph.nodes)
    transforms = {path: r.transform.name for r in moved for path in r.asked if path not in too_late(r, runs)}
    for node, leaf in graph.leaves():
        if leaf.kind in (*LISTED, LeafKind.EXPERTS) and leaf.path not in rows:
            rows[leaf.path] = _row(node, leaf, source, written)
            rows[leaf.path].transform = transforms.get(leaf.path)
    report.layers = list(rows.values())
    dense = dense_bytes(paths, source)
    quantized = {leaf.path: (node, leaf) for node, leaf in graph.linears() if scheme_of(node) is not None}
    report.total_bytes = dense + sum(_packed_bytes(node, leaf, source) for node, leaf in quantized.values())
    report.total_bytes += _cache_bytes(graph, source)
    report.dense_total_bytes = _stored_bytes(source)


def _stored_bytes(source: ModelSource) -> int:
    """Bytes of the model as its files hold it, whatever dtype it is loaded in, tied weights once; without files, as
    it would be written.
    """
    if source.has_weights:
        names = source.names
        paths = [path for path in source.model.state_dict() if path not in names.absent and path not in names.aliases]
        return sum({meta.key: meta.nbytes for path in paths for meta in names.sources(path)}.values())
    tensors = [*source.model.parameters(), *_persistent_buffers(source)]
    return sum(tensor_bytes(tensor.dtype, tuple(tensor.shape)) for tensor in tensors)


def _stored_size(leaf: Leaf, source: ModelSource) -> int:
    """Bytes of one element of a leaf's weight as the files hold it; without files, as it would be written."""
    stored = (
        [path for path in _parameters(leaf, source) if path not in source.names.absent] if source.has_weights else []
    )
    return source.names.sources(stored[0])[0].dtype.itemsize if stored else source.dtype.itemsize


def _row(node: Node, leaf: Leaf, source: ModelSource, written: Set[str]) -> LayerRow:
    scheme, quant, role = scheme_of(node), get_quant(node), need(node, Role)
    size = source.dtype.itemsize
    dense = sum(_own_bytes(path, source) for path in _parameters(leaf, source) if path in written)
    packed = _packed_bytes(node, leaf, source) if scheme else 0
    weights = leaf.out_features * leaf.in_features or leaf.parameters
    return LayerRow(
        path=leaf.path,
        kind=str(leaf.kind),
        structure=str(role.structure) if role.structure else None,
        layer=role.layer,
        shape=(leaf.out_features, leaf.in_features),
        scheme=scheme.short if scheme else None,
        format=str(scheme.format) if scheme else None,
        solver=quant.solver if quant and scheme else None,
        because=_because(leaf, quant),
        bytes=dense + packed,
        dense_bytes=leaf.parameters * _stored_size(leaf, source),
        bits_per_weight=8 * packed / weights if scheme else 8 * size,
    )


def _because(leaf: Leaf, quant: Quant | None) -> str:
    if quant is not None:
        return ", ".join(quant.because)
    if leaf.kind is LeafKind.EXPERTS:
        return "blocks of experts are not quantized"
    if leaf.kind is LeafKind.BARE_LINEAR:
        return "a linear without a module of its own is not quantized"
    return "no rule selects it"


def _parameters(leaf: Leaf, source: ModelSource) -> list[str]:
    """The parameters that a leaf owns. A bare linear's module may hold more than its weight, down its tree."""
    module = source.model.get_submodule(leaf.path)
    own = module.named_parameters(recurse=leaf.kind is not LeafKind.BARE_LINEAR, remove_duplicate=False)
    return [f"{leaf.path}.{name}" for name, _ in own]


def _own_bytes(path: str, source: ModelSource) -> int:
    """Bytes of a parameter as it is written; of what is stored together with others, its share."""
    if source.has_weights:
        return tensor_bytes(*source.names.spec(path))
    value = source.model.get_parameter(path)
    return tensor_bytes(value.dtype, tuple(value.shape))


def _packed_bytes(node: Node, leaf: Leaf, source: ModelSource) -> int:
    scheme = scheme_of(node)
    assert scheme is not None
    tensors = layout(scheme, leaf.out_features, leaf.in_features, source.dtype)
    return sum(tensor_bytes(*spec) for spec in tensors.values())


def _cache_specs(graph: Graph, spec: KVCacheSpec, source: ModelSource) -> dict[str, Spec]:
    specs: dict[str, Spec] = {}
    for cached in cached_tensors(graph):
        shape = (int(value(cached.node).shape[1]), 1, 1) if spec.strategy == "attn_head" else (1,)
        specs[f"{source.names.disk_module(cached.path)}.{cache_scale(cached.part)}"] = (source.dtype, shape)
    return specs


def _cache_bytes(graph: Graph, source: ModelSource) -> int:
    """Bytes of the KV cache's scales: known once their observers stand in the graph."""
    if graph.kv_cache is None:
        return 0
    heads: dict[str, int] = {}  # by statistic: an attention that runs twice has one
    for node in graph.nodes:
        observer = get(node, Observer)
        if observer is not None and observer.purpose != "input":
            heads[observer.id] = int(value(node).shape[1]) if graph.kv_cache.strategy == "attn_head" else 1
    return sum(heads.values()) * source.dtype.itemsize


def _persistent_buffers(source: ModelSource) -> list[Tensor]:
    state = source.model.state_dict()
    parameters = {name for name, _ in source.model.named_parameters(remove_duplicate=False)}
    return [tensor for name, tensor in state.items() if name not in parameters]
