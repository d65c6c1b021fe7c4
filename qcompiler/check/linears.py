"""The linears of a checkpoint: from the graph of its model where it is captured, else guessed from tensor names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from qcompiler.capture import capture_graph
from qcompiler.check.checkpoint import PARTS, Checkpoint
from qcompiler.checkpoints.conversions import Conversion, reading
from qcompiler.checkpoints.ties import not_by_design, tie_classes
from qcompiler.emit.sites import EXPERT_NAME, Site
from qcompiler.errors import CaptureError, CheckpointError, LegalityError, ModelConfigError
from qcompiler.formats import cache_scale
from qcompiler.ir.annotations import Structure
from qcompiler.ir.graph import Graph
from qcompiler.lowering.sites import sites
from qcompiler.meta import build_on_meta
from qcompiler.patterns.cache import cached_tensors
from qcompiler.source import ModelSource, read_config
from qcompiler.tensors import Spec

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear that loaders look for.

    path: its module in Transformers. disk: what its tensors are named by, and the modules of vLLM and SGLang.
    quantizable: whether Transformers may quantize it (it is an `nn.Linear`, or a block of experts).
    """

    path: Site
    disk: Site
    quantizable: bool = True

    @property
    def name(self) -> str:
        return self.disk.name


@dataclass(frozen=True, slots=True)
class Linears:
    """Every linear, and what else the model says of its tensors.

    guessed: why the model was not captured, None where it was; then only `linears` is known. refused: whether that is
    because Transformers refuses the config. mend: what to do about it. missing: dense parameters
    that no file holds, by path. unknown: keys that the model has no place for. dense: by key, what the model wants of
    tensors that are not quantized. embeddings: they may be quantized too. tied: keys of tensors that the model ties
    and the files hold twice, the one that counts first. ties: paths of
    all parameters that it ties. prefixed: keys that only Transformers finds, with their paths.
    cache_scales: the keys of the scales that a
    quantized KV cache would have. classes: of all modules.
    """

    linears: tuple[Linear, ...]
    dtype: torch.dtype
    guessed: str | None = None
    refused: bool = False
    mend: str = ""
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    dense: Mapping[str, Spec] = field(default_factory=dict)
    embeddings: tuple[Linear, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    ties: frozenset[str] = frozenset()
    prefixed: tuple[tuple[str, str], ...] = ()
    cache_scales: tuple[str, ...] = ()
    head_sizes: tuple[int, ...] = ()
    classes: frozenset[str] = frozenset()


def find_linears(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Linears:
    """The linears of a checkpoint. Where the class cannot be captured, `guessed` says why."""
    try:
        config = read_config(checkpoint.folder, trust_remote_code=trust_remote_code)
        vars(config).pop("quantization_config", None)
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else _dtype(checkpoint)
        model = build_on_meta(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return _captured(checkpoint, model, capture_graph(model))
    except CaptureError as error:
        refused = isinstance(error, ModelConfigError)
        return Linears(
            tuple(_guessed(checkpoint)),
            _dtype(checkpoint),
            guessed=error.message,
            refused=refused,
            mend=error.hint or "",
            cache_scales=tuple(key for key in checkpoint.reader.tensors if key.endswith((".k_scale", ".v_scale"))),
        )


def _captured(checkpoint: Checkpoint, model: PreTrainedModel, graph: Graph) -> Linears:
    conversions, unused = _conversions(checkpoint, model)
    state = model.state_dict()
    plain = {c.name: c.sources[0] for c in conversions if c.converter is None}
    linears = []
    for site in sites(graph):
        weight = f"{site.name}.weight"
        if site.kind == "experts":
            continue
        module = model.get_submodule(site.name)
        disk = plain.get(weight, weight).removesuffix(".weight")
        linears.append(
            Linear(site, replace(site, name=disk, fusion_group=None), quantizable=isinstance(module, nn.Linear))
        )
    merged = [c for c in conversions if c.converter is not None]
    sources = [key for c in merged for key in c.sources]
    linears += _experts(checkpoint, graph, sources)
    made = plain.keys() | _made(merged, state)
    shared = {path for paths in tie_classes(model) if made & set(paths) for path in paths}
    missing, _ = not_by_design(model, [path for path in state if path not in made | shared], ())
    cache = _cache_scales(graph, plain)
    _, unknown = not_by_design(model, (), [key for key in unused if key not in cache])
    unknown += tuple(_experts_beyond(sources, {linear.name for linear in linears}))
    return Linears(
        tuple(linears),
        model.dtype,
        missing=tuple(sorted(missing)),
        unknown=unknown,
        dense={key: (state[path].dtype, tuple(state[path].shape)) for path, key in plain.items() if path in state},
        embeddings=tuple(_embeddings(model, plain)),
        ties=frozenset(path for paths in tie_classes(model) for path in paths),
        tied=tuple(_held_twice(checkpoint, model, plain)),
        prefixed=tuple(_prefixed(model, plain)),
        cache_scales=cache,
        head_sizes=ModelSource(checkpoint.folder, model.config, model).head_sizes,
        classes=frozenset(type(module).__name__ for module in model.modules()),
    )


def _embeddings(model: PreTrainedModel, plain: Mapping[str, str]) -> Iterator[Linear]:
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            rows, columns = module.weight.shape
            site = Site(path, rows, columns, class_name="Embedding", structure=Structure.EMBEDDING)
            disk = plain.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")
            yield Linear(site, replace(site, name=disk))


def _held_twice(checkpoint: Checkpoint, model: PreTrainedModel, plain: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for paths in tie_classes(model):
        keys = [plain[path] for path in paths if plain.get(path) in checkpoint.reader.tensors]
        yield from ((keys[0], other) for other in keys[1:] if other != keys[0])


def _prefixed(model: PreTrainedModel, plain: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names with `model.` too much or too little. vLLM's classes know of other prefixes, such as GPT-2's."""
    if model.base_model_prefix == "model":
        yield from ((key, path) for path, key in plain.items() if f"model.{key}" == path or key == f"model.{path}")


def _conversions(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[list[Conversion], tuple[str, ...]]:
    """How the checkpoint's keys become the model's, were its quantized modules dense. Nothing of it is read."""
    keys: dict[str, None] = {}
    for key in checkpoint.reader.tensors:
        module, _, part = key.rpartition(".")
        quantized = PARTS.fullmatch(part) is not None and checkpoint.is_quantized(module)
        keys[f"{module}.weight" if quantized else key] = None
    try:
        return reading(keys, get_model_conversion_mapping(model), model)
    except CheckpointError as error:  # two keys for one parameter
        raise CaptureError(error.message, hint=error.hint) from error


def _made(merged: list[Conversion], state: Mapping[str, Any]) -> set[str]:
    """The paths that conversions of several tensors make: beside the first, others of the same module."""
    modules = {conversion.name.rpartition(".")[0] for conversion in merged}
    return {path for path in state if path.rpartition(".")[0] in modules}


def _experts(checkpoint: Checkpoint, graph: Graph, sources: list[str]) -> Iterator[Linear]:
    """The projections of every expert, by their names on disk; of a block that is stored merged, by the usual ones."""
    known = [site for site in sites(graph) if site.kind == "experts"]
    stored = {key.removesuffix(".weight") for key in sources if EXPERT_NAME.fullmatch(key.removesuffix(".weight"))}
    if not stored:
        yield from (Linear(site, site) for site in known)
        return
    counts = [int(match["index"]) for site in known if (match := EXPERT_NAME.fullmatch(site.name))]
    blocks: dict[str, set[str]] = {}
    for name in stored:
        match = EXPERT_NAME.fullmatch(name)
        assert match is not None
        blocks.setdefault(match["block"], set()).add(match["projection"])
    for block in sorted(blocks):
        for index in range(1 + max(counts, default=-1)):
            for leaf in sorted(blocks[block]):
                site = _expert(checkpoint, f"{block}.{index}.{leaf}")
                yield Linear(site, site)


def _experts_beyond(sources: list[str], known: Collection[str]) -> Iterator[str]:
    """Keys of experts that the config does not count."""
    for key in sources:
        name = key.removesuffix(".weight")
        if EXPERT_NAME.fullmatch(name) and name not in known:
            yield key


def _expert(checkpoint: Checkpoint, name: str) -> Site:
    out, inner = stored_shape(checkpoint, name) or (0, 0)
    return Site(name, out, inner, structure=Structure.EXPERTS, kind="experts")


def stored_shape(checkpoint: Checkpoint, module: str) -> tuple[int, int] | None:
    """Rows and columns of a module's weight, as its own tensors tell them; None where they do not."""
    parts = checkpoint.parts.get(module, {})
    shape = parts.get("weight_shape")
    if shape is not None and shape.shape == (2,) and shape.dtype in (torch.int64, torch.int32):
        rows, columns = (int(size) for size in torch.cat(list(checkpoint.chunks(shape))))
        return rows, columns
    for part, factor in (("weight", 1), ("weight_packed", 2)):
        meta = parts.get(part)
        if meta is not None and len(meta.shape) == 2 and (factor == 1 or meta.dtype is torch.uint8):
            return meta.shape[0], meta.shape[1] * factor
    return None


def _guessed(checkpoint: Checkpoint) -> Iterator[Linear]:
    """Modules with quantized tensors, and those with a matrix that is no embedding by its name."""
    for module in checkpoint.parts:
        leaf = module.rpartition(".")[2]
        shape = stored_shape(checkpoint, module)
        embedding = "embed" in module or leaf in ("wte", "wpe")
        if checkpoint.is_quantized(module) or (shape is not None and not embedding):
            if EXPERT_NAME.fullmatch(module):
                site = _expert(checkpoint, module)
            else:
                structure = Structure.LM_HEAD if leaf == "lm_head" else None
                site = Site(module, *(shape or (0, 0)), structure=structure)
            yield Linear(site, site)


def _cache_scales(graph: Graph, plain: Mapping[str, str]) -> tuple[str, ...]:
    try:
        return tuple(f"{_disk_module(c.path, plain)}.{cache_scale(c.part)}" for c in cached_tensors(graph))
    except LegalityError:  # an attention that keeps no keys and values of its own
        return ()


def _disk_module(path: str, plain: Mapping[str, str]) -> str:
    """The name on disk of a module that holds others: what stands before the same rest."""
    for inner, key in plain.items():
        rest = inner.removeprefix(path)
        if inner != rest and rest.startswith(".") and key.endswith(rest):
            return key.removesuffix(rest)
    return path


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the config declares, else the first dense dtype in the files."""
    declared = _DTYPES.get(str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))))
    stored = (meta.dtype for meta in checkpoint.reader.tensors.values() if meta.dtype in _DTYPES.values())
    return declared or next(stored, torch.float32)
