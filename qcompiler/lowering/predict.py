"""Predict, without a weight, every tensor that a compilation will write: names of layers, bytes, bits per weight."""

from __future__ import annotations

from collections.abc import Iterable

from qcompiler.checkpoints.header import tensor_bytes
from qcompiler.formats import layout
from qcompiler.ir.annotations import Leaf, LeafKind, Role, get_quant, need
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph
from qcompiler.lowering.sites import LISTED, scheme_of
from qcompiler.report import LayerRow, Report
from qcompiler.source import ModelSource


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


def dense_bytes(paths: Iterable[str], source: ModelSource) -> int:
    """Bytes of these parameters as they are written."""
    if source.has_weights:
        return sum(tensor_bytes(dtype, shape) for dtype, shape in source.names.dense_specs(paths).values())
    state = source.model.state_dict()
    return sum(tensor_bytes(state[path].dtype, tuple(state[path].shape)) for path in paths)


def predict(graph: Graph, source: ModelSource, report: Report) -> None:
    """Fill the report's layers and totals. Numbers are exact: they equal what `lower` writes, to the byte."""
    rows: dict[str, LayerRow] = {}
    for node, leaf in graph.leaves():
        if leaf.kind in (*LISTED, LeafKind.EXPERTS):
            rows.setdefault(leaf.path, _row(node, leaf, source))
    report.layers = list(rows.values())
    dense = dense_bytes(written_paths(graph, source), source)
    quantized = {leaf.path: (node, leaf) for node, leaf in graph.linears() if scheme_of(node) is not None}
    report.total_bytes = dense + sum(_packed_bytes(node, leaf, source) for node, leaf in quantized.values())
    report.total_bytes += _cache_bytes(graph, source)
    report.dense_total_bytes = sum(tensor_bytes(p.dtype, tuple(p.shape)) for p in source.model.parameters()) + sum(
        tensor_bytes(b.dtype, tuple(b.shape)) for b in _persistent_buffers(source)
    )


def _row(node: Node, leaf: Leaf, source: ModelSource) -> LayerRow:
    scheme, quant, role = scheme_of(node), get_quant(node), need(node, Role)
    size = source.dtype.itemsize
    dense = leaf.parameters * size
    weights = leaf.out_features * leaf.in_features or leaf.parameters
    bias = leaf.out_features * size if leaf.bias else 0
    written = (
        _packed_bytes(node, leaf, source) if scheme else dense - (bias if leaf.kind is not LeafKind.EXPERTS else 0)
    )
    return LayerRow(
        path=leaf.path,
        kind=str(leaf.kind),
        structure=str(role.structure) if role.structure else None,
        layer=role.layer,
        shape=(leaf.out_features, leaf.in_features),
        scheme=scheme.short if scheme else None,
        format=str(scheme.format) if scheme else None,
        solver=quant.solver if quant and scheme else None,
        because=", ".join(quant.because) if quant else "no rule selects it",
        bytes=written + (bias if leaf.kind is not LeafKind.EXPERTS else 0),
        dense_bytes=dense,
        bits_per_weight=8 * written / weights,
    )


def _packed_bytes(node: Node, leaf: Leaf, source: ModelSource) -> int:
    scheme = scheme_of(node)
    assert scheme is not None
    tensors = layout(scheme, leaf.out_features, leaf.in_features, source.dtype)
    return sum(meta.nbytes for meta in tensors.values())


def _cache_bytes(graph: Graph, source: ModelSource) -> int:
    """Bytes of the KV cache's scales: known once their observers stand in the graph."""
    if graph.kv_cache is None:
        return 0
    from qcompiler.ir.annotations import Observer, get
    from qcompiler.ir.fx import value

    total = 0
    for node in graph.nodes:
        observer = get(node, Observer)
        if observer is not None and observer.purpose != "input":
            heads = int(value(node).shape[1]) if graph.kv_cache.strategy == "attn_head" else 1
            total += heads * source.dtype.itemsize
    return total


def _persistent_buffers(source: ModelSource) -> list[object]:
    state = source.model.state_dict()
    parameters = {name for name, _ in source.model.named_parameters(remove_duplicate=False)}
    return [tensor for name, tensor in state.items() if name not in parameters]
