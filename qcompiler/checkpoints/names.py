"""Which tensors on disk a model's parameters come from, and under which names they are written.

A *path* is a name in the model's state dict, a *key* a name on disk. The two differ: Transformers renames and merges at
load, the base model's prefix comes and goes, and tied parameters are stored once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Self

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, PrefixChange, SplitModulelist, build_glob_alternation

from qcompiler.checkpoints.conversions import Conversion, reading, writing
from qcompiler.checkpoints.header import TensorMeta
from qcompiler.checkpoints.quantized import refuse_codes, refuse_scales
from qcompiler.checkpoints.reader import RawTensor, TensorSource
from qcompiler.checkpoints.ties import Ties, not_by_design, resolve_ties, tie_classes
from qcompiler.errors import CheckpointError, did_you_mean
from qcompiler.tensors import Spec


@dataclass(frozen=True, slots=True)
class _Write:
    """One conversion towards the disk. raw: it makes the very tensors that the values were read from."""

    conversion: Conversion
    keys: Mapping[str, Spec]
    raw: bool


class NameMap:
    """The paths of a model against the keys of a checkpoint, both ways.

    unexpected: keys of the checkpoint that the model has no place for, and that Transformers too finds unexpected.
    absent: paths that no file holds and that Transformers knows to be absent: neither loaded nor written.
    aliases: tied paths that are not written, each with the path that is written for it.
    apart: paths that the model ties, and that the checkpoint holds with other values than the path given with each.
    assumed: tied paths that the checkpoint holds too, and that nobody compared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reader: TensorSource,
        reads: Mapping[str, Conversion],
        ties: Ties,
        absent: frozenset[str],
        unexpected: tuple[str, ...],
        transforms: Sequence[object],
        assumed: tuple[str, ...] = (),
    ) -> None:
        self.unexpected = unexpected
        self.absent = absent
        self.assumed = assumed
        self.aliases: Mapping[str, str] = MappingProxyType(dict(ties.aliases))
        self.apart: Mapping[str, str] = MappingProxyType(dict(ties.apart))
        self._model = model
        self._reader = reader
        self._reads = reads
        self._stand_ins = ties.stand_ins
        self._specs = _loaded_specs(model, reads)
        left_out = set(ties.aliases) | absent | set(model._keys_to_ignore_on_save or ())
        self._writes = self._plan_writing([path for path in self._specs if path not in left_out], transforms)

    @classmethod
    def build(cls, model: PreTrainedModel, reader: TensorSource, *, compare: bool = True) -> Self:
        """Match a model (on any device, usually `meta`) with a checkpoint. No tensor is read but tied duplicates.

        compare: whether those are read. Without, they are taken for equal, as the model says: `assumed`.

        Parameters are loaded in the dtype that they have in `model`, or float32 where Transformers insists on it.
        Names to write are what `save_pretrained` would write after loading this checkpoint.

        Raises `CheckpointError` for missing parameters, shapes that differ, keys that cannot be told apart, and weights
        that are quantized already.
        """
        transforms = get_model_conversion_mapping(model)
        conversions, unused = reading(reader.tensors, transforms, model)
        _, unexpected = not_by_design(model, (), unused)
        refuse_codes(model, reader, conversions)
        refuse_scales(model, reader, conversions, unexpected)
        state = model.state_dict()
        reads = {path: conversion for conversion in conversions for path in _dry_run(conversion, model, state, reader)}
        tied = tie_classes(model)
        ties = resolve_ties(tied, reads, partial(_same, model, reader) if compare else _taken_for_equal)
        doubles = () if compare else tuple(path for path in ties.aliases if path in reads)
        missing = frozenset(state.keys() - reads.keys() - ties.stand_ins.keys())
        lost, _ = not_by_design(model, missing, ())
        if lost:
            raise _missing(reader, sorted(lost), unused)
        used = [t for t in transforms if t.was_used()]
        return cls(model, reader, reads, ties, missing, unexpected, used, doubles)

    @classmethod
    def of_loaded(cls, model: PreTrainedModel, reader: TensorSource, transforms: Sequence[object] | None) -> Self:
        """Match a model with the state dict of the loaded one that it is a copy of: keys of `reader` are paths.

        transforms: those that the loaded model remembers from its loading, so that it is written as it was read
        (`revert_weight_conversion`); `None` for a model made from its config, which is written as a new one.

        Raises `CheckpointError` where the two are not of one shape.
        """
        if transforms is None:
            new = get_model_conversion_mapping(model, add_legacy=False)
            transforms = [t for t in new if not isinstance(t, PrefixChange)]
        state = model.state_dict()
        if foreign := sorted(reader.tensors.keys() ^ state.keys()):
            raise CheckpointError(
                f"{reader.origin} has other parameters than its config describes: {', '.join(foreign[:5])}",
                hint="merge or remove adapters and modules of your own, and make its config say what it is",
            )
        conversions = [Conversion(path, (path,)) for path in state]
        refuse_codes(model, reader, conversions)
        reads = {path: conversion for conversion in conversions for path in _dry_run(conversion, model, state, reader)}
        ties = resolve_ties(tie_classes(model), reads, partial(_same, model, reader))
        return cls(model, reader, reads, ties, frozenset(), (), transforms)

    def spec(self, path: str) -> Spec:
        """Dtype and shape of a parameter or persistent buffer as `load` returns it."""
        try:
            return self._specs[path]
        except KeyError:
            raise CheckpointError(
                f"the model has no parameter {path!r}{did_you_mean(path, self._specs)}", hint="use state dict names"
            ) from None

    def sources(self, path: str) -> tuple[TensorMeta, ...]:
        """The tensors on disk that a path is loaded from."""
        return tuple(self._reader.meta(key) for key in self._read_of(path).sources)

    def load(self, path: str) -> torch.Tensor:
        """The value of one path, as `from_pretrained` would set it."""
        return self.load_many([path])[path]

    def load_many(self, paths: Iterable[str]) -> dict[str, torch.Tensor]:
        """The values of several paths; what is stored together is read once, tied paths share one tensor."""
        values: dict[str, torch.Tensor] = {}
        done: dict[str, dict[str, torch.Tensor]] = {}
        for path in paths:
            conversion = self._read_of(path)
            if conversion.name not in done:
                dtype = self.spec(conversion.name)[0]
                lazy = {key: partial(_read_as, self._reader, key, dtype) for key in conversion.sources}
                done[conversion.name] = conversion.run(lazy, self._model)
            values[path] = done[conversion.name][self._stand_ins.get(path, path)]
        return values

    def disk_name(self, path: str) -> str | None:
        """The key under which a path is written as it is, or `None` if it is not (see `obstacle`)."""
        return None if self.obstacle(path) else self._writes[path].conversion.name

    def disk_module(self, path: str) -> str:
        """The name on disk of a module that has parameters; its path where none of them keeps its own name."""
        for inner in self._specs:
            if inner.startswith(f"{path}.") and (name := self.disk_name(inner) if inner not in self.absent else None):
                rest = inner.removeprefix(path)
                if name.endswith(rest):
                    return name.removesuffix(rest)
        return path

    def obstacle(self, path: str) -> str | None:
        """Why a path has no key of its own on disk, or `None` if it has one."""
        self.spec(path)
        if path in self.aliases:
            return f"{path} is tied to {self.aliases[path]}, which is written for both"
        if path not in self._writes:
            return f"{path} is not part of a saved model"
        write = self._writes[path]
        if write.conversion.converter is None:
            return None
        others = [other for other in write.conversion.sources if other != path]
        together = f" together with {', '.join(others)}" if others else ""
        keys = [f"{key!r}" for key in write.keys]
        shown = ", ".join(keys[:3]) + (f", ... ({len(keys)} tensors)" if keys[3:] else "")
        return f"{path} is stored{together} as {shown} ({write.conversion.operations})"

    def dense_specs(self, paths: Iterable[str]) -> dict[str, Spec]:
        """Keys, dtypes and shapes of what `dense` returns: enough to predict a file's size."""
        return {key: spec for write in self._writes_of(paths) for key, spec in write.keys.items()}

    def dense(
        self, paths: Iterable[str], replaced: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> dict[str, torch.Tensor | RawTensor]:
        """What to write for `paths`, by key: copies of the source's bytes where key and dtype stay, else tensors.

        `replaced` are values by path, on the CPU, of those that are not written as they are loaded. Tied paths are left
        out, save the one that is written. Raises `CheckpointError` if a tensor on disk is made of paths of which only
        some are given, and for a replaced value that no tensor on disk takes.
        """
        paths = list(paths)
        for path in replaced:
            if path not in self._writes:
                raise CheckpointError(f"a new value of {path} cannot be written: {self.obstacle(path)}")
        written: dict[str, torch.Tensor | RawTensor] = {}
        for write in self._writes_of(paths):
            sources = write.conversion.sources
            new = {path: replaced[path] for path in sources if path in replaced}
            if write.raw and not new:
                written |= {key: RawTensor(self._reader, key) for key in write.keys}
            else:
                loaded = self.load_many(path for path in sources if path not in new)
                written |= write.conversion.run(loaded | new, self._model)
        return written

    def parts(self, path: str) -> dict[str, tuple[int, slice]] | None:
        """How a merged expert parameter [experts, rows, ...] is split on disk: by key, the expert and its rows.

        `None` if it is not merged from per-expert tensors by stacking and concatenating rows alone.
        """
        write = self._writes.get(path)
        shape = self.spec(path)[1]
        if write is None or write.conversion.converter is None or len(shape) < 2:
            return None
        if not all(isinstance(op, (Chunk, SplitModulelist)) for op in write.conversion.converter.operations):
            return None
        # Stacking and chunking only move rows: run them on a tensor whose rows are their own numbers.
        experts, rows = shape[:2]
        numbers = torch.arange(experts * rows).reshape(experts, rows, *(1 for _ in shape[2:]))
        probe = numbers.expand(experts, rows, *(2 for _ in shape[2:]))
        found: dict[str, tuple[int, slice]] = {}
        for key, part in write.conversion.run(dict.fromkeys(write.conversion.sources, probe), self._model).items():
            first, count = int(part.flatten()[0]), part.numel() // (2 ** len(shape[2:]))
            if write.keys[key][1] != (count, *shape[2:]):
                return None
            found[key] = (first // rows, slice(first % rows, first % rows + count))
        return found

    def _read_of(self, path: str) -> Conversion:
        self.spec(path)
        if path in self.absent:
            raise CheckpointError(
                f"{self._reader.origin}: no file holds {path!r}; Transformers computes or initializes it",
                hint="do not load the paths in `absent`",
            )
        return self._reads[self._stand_ins.get(path, path)]

    def _writes_of(self, paths: Iterable[str]) -> list[_Write]:
        given = set(paths)
        writes = {id(w): w for path in given if (w := self._writes.get(path)) is not None}
        for path in given:
            self.spec(path)
        for write in writes.values():
            if lacking := set(write.conversion.sources) - given:
                raise CheckpointError(
                    f"{write.conversion.name} on disk is made of {', '.join(write.conversion.sources)}; "
                    f"{', '.join(sorted(lacking))} is not written with the others",
                    hint="treat all of them alike: quantize none of them, or all if the layout has names of their own",
                )
        return sorted(writes.values(), key=lambda write: write.conversion.name)

    def _plan_writing(self, paths: Sequence[str], transforms: Sequence[object]) -> dict[str, _Write]:
        planned: dict[str, _Write] = {}
        owner: dict[str, Conversion] = {}
        for conversion in writing(paths, transforms):
            values = {path: _meta_tensor(*self._specs[path]) for path in conversion.sources}
            results = conversion.run(values, self._model)
            keys = {key: (value.dtype, tuple(value.shape)) for key, value in results.items()}
            held = {meta.key: (meta.dtype, meta.shape) for path in conversion.sources for meta in self.sources(path)}
            for key in keys:
                if key in owner:
                    raise CheckpointError(f"{conversion} and {owner[key]} would both be written as {key!r}")
                owner[key] = conversion
            planned |= dict.fromkeys(conversion.sources, _Write(conversion, keys, raw=keys == held))
        return planned


def _dry_run(
    conversion: Conversion, model: PreTrainedModel, state: Mapping[str, torch.Tensor], reader: TensorSource
) -> list[str]:
    """The paths that a conversion sets, learnt on meta tensors, with shapes checked against the model's."""
    metas = [reader.meta(key) for key in conversion.sources]
    results = conversion.run({meta.key: _meta_tensor(meta.dtype, meta.shape) for meta in metas}, model)
    for path, value in results.items():
        if path not in state:
            raise CheckpointError(f"{conversion}: it also makes {path!r}, which the model does not have")
        if value.shape != state[path].shape:
            raise CheckpointError(
                f"{metas[0].file}: the model's {path!r} has shape {list(state[path].shape)}, the checkpoint's "
                f"{list(value.shape)} ({conversion})",
                hint="config.json and weights are of different models, or tensors are missing from the checkpoint",
            )
    return list(results)


def _loaded_specs(model: PreTrainedModel, reads: Mapping[str, Conversion]) -> dict[str, Spec]:
    """Dtype and shape in which Transformers loads each path: the model's dtype, or what its class keeps in float32."""
    state = model.state_dict()
    plan = model._get_dtype_plan(model.dtype)
    pattern, by_group, _ = build_glob_alternation(list(plan))

    def dtype(path: str) -> torch.dtype:
        match: re.Match[str] | None = pattern.search(path) if plan else None
        kept: torch.dtype | None = plan[by_group[match.lastgroup]] if match is not None else None
        return kept or state[path].dtype

    # What one conversion makes is cast before it, to the dtype of its first result.
    return {path: (dtype(reads[path].name if path in reads else path), tuple(v.shape)) for path, v in state.items()}


def _meta_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _read_as(reader: TensorSource, key: str, dtype: torch.dtype) -> torch.Tensor:
    return reader.read(key).to(dtype)


def _same(model: PreTrainedModel, reader: TensorSource, a: Conversion, b: Conversion) -> bool:
    """Whether two conversions give equal values. Stored under plain names, they are compared without being held."""
    if a.converter is None and b.converter is None:
        return reader.same_bytes(a.sources[0], b.sources[0])
    left, right = (list(c.run({k: partial(reader.read, k) for k in c.sources}, model).values()) for c in (a, b))
    return len(left) == len(right) and all(map(torch.equal, left, right))


def _taken_for_equal(a: Conversion, b: Conversion) -> bool:
    return True


def _missing(reader: TensorSource, missing: Sequence[str], unused: Sequence[str]) -> CheckpointError:
    shown = "; ".join(f"{path!r}{did_you_mean(path, unused)}" for path in missing[:5])
    more = f" and {len(missing) - 5} more" if missing[5:] else ""
    return CheckpointError(
        f"{reader.origin}: no file holds {len(missing)} of the model's parameters: {shown}{more}",
        hint="the checkpoint is incomplete, or is of another model than its config.json says",
    )
