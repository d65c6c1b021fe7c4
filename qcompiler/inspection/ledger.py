"""What the bytes of a checkpoint are spent on: entries that add up to the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from qcompiler.checkpoints.header import TensorMeta
from qcompiler.formats import layout
from qcompiler.inspection.document import LedgerEntry
from qcompiler.ir.annotations import Leaf, LeafKind, need, scheme_of
from qcompiler.ir.graph import Graph
from qcompiler.lowering.predict import quantized_paths, written_paths
from qcompiler.source import ModelSource
from qcompiler.tensors import tensor_bytes

_PARTS = {
    "weight_packed": "quantized weights",
    "weight": "quantized weights",
    "weight_shape": "shapes of packed weights",
    "weight_scale": "scales of weights",
    "weight_global_scale": "scales of weights",
    "weight_zero_point": "zero points of weights",
    "input_scale": "scales of activations",
    "input_global_scale": "scales of activations",
    "input_zero_point": "scales of activations",
    "k_scale": "scales of the key/value cache",
    "v_scale": "scales of the key/value cache",
}
_DENSE = {
    LeafKind.LINEAR: "dense linears",
    LeafKind.CONV1D: "dense linears",
    LeafKind.BARE_LINEAR: "routers and bare linears",
    LeafKind.EMBEDDING: "embeddings",
    LeafKind.NORM: "norms",
    LeafKind.EXPERTS: "dense experts",
}
_OTHER = "other tensors"


def planned_ledger(graph: Graph, source: ModelSource, total: int) -> tuple[LedgerEntry, ...]:
    """Where the predicted `total` of bytes goes."""
    spent: Counter[str] = Counter()
    for node in quantized_paths(graph).values():
        leaf, scheme = need(node, Leaf), scheme_of(node)
        assert scheme is not None
        for name, spec in layout(scheme, leaf.out_features, leaf.in_features, source.dtype).items():
            spent[_PARTS[name]] += tensor_bytes(*spec)
    kinds, state = _kinds(graph), source.model.state_dict()
    for path in written_paths(graph, source):
        spec = source.names.spec(path) if source.has_weights else (state[path].dtype, tuple(state[path].shape))
        spent[_kind_of(path, kinds)] += tensor_bytes(*spec)
    # The cache's scales are predicted in one number; parameters that only together have a form on disk may differ too.
    if left := total - spent.total():
        spent["scales of the key/value cache" if graph.kv_cache is not None else _OTHER] += left
    return _entries(spent)


def stored_ledger(
    graph: Graph, source: ModelSource, stored: Mapping[str, TensorMeta], quantized: Iterable[str]
) -> tuple[LedgerEntry, ...]:
    """Where the bytes of a folder go: tensors by what they are, then files. `quantized`: modules by names on disk."""
    spent: Counter[str] = Counter()
    modules, kinds = set(quantized), _kinds(graph)
    paths = {
        meta.key: path
        for path in source.model.state_dict()
        if path not in source.names.absent
        for meta in source.names.sources(path)
    }
    for key, meta in stored.items():
        module, _, part = key.rpartition(".")
        known = part in _PARTS and (module in modules or part in ("k_scale", "v_scale"))
        spent[_PARTS[part] if known else _kind_of(paths.get(key, key), kinds)] += meta.nbytes
    return (*_entries(spent), *_files(source.folder, spent.total()))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _files(folder: Path, tensors: int) -> tuple[LedgerEntry, ...]:
    spent: Counter[str] = Counter({"headers and index of tensors": -tensors})
    for file in folder.rglob("*"):
        if file.is_file():
            weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
            token = "token" in file.name or file.name in ("vocab.json", "merges.txt", "chat_template.jinja")
            settings = file.name.endswith(".json")
            what = "headers and index of tensors" if weights else "tokenizer" if token else "other files"
            spent["config and report" if settings and not weights and not token else what] += file.stat().st_size
    return _entries(spent, where="files")


def _kinds(graph: Graph) -> dict[str, LeafKind]:
    return {leaf.path: leaf.kind for _, leaf in graph.leaves()}


def _kind_of(path: str, kinds: Mapping[str, LeafKind]) -> str:
    """What a tensor outside quantized weights is, by the leaf that owns it."""
    owner, _, name = path.rpartition(".")
    while owner and owner not in kinds:
        owner = owner.rpartition(".")[0]
    kind = kinds.get(owner)
    if name == "bias" and kind in (LeafKind.LINEAR, LeafKind.CONV1D):
        return "biases"
    return _DENSE.get(kind, _OTHER) if kind is not None else _OTHER


def _entries(spent: Mapping[str, int], where: str = "tensors") -> tuple[LedgerEntry, ...]:
    order = sorted((item for item in spent.items() if item[1]), key=lambda item: -item[1])
    return tuple(LedgerEntry.model_validate({"what": what, "bytes": size, "where": where}) for what, size in order)
