"""Transformers' own renaming and merging of checkpoint keys, one group of tensors at a time.

Transformers 5 renames keys and merges tensors when it loads a model, and undoes it when it saves one
(`transformers.core_model_loading`), for the whole state dict at once. Here the same transforms are applied to *names*
first; what results is a list of small independent `Conversion`s, each of which runs when its tensors are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from qcompiler.errors import CheckpointError

Lazy = torch.Tensor | Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensors `sources` become tensors of other names: by a rename (`converter` is `None`), or by operations.

    `name` is the result's name, of several results the first. `patterns[i]` is the pattern that `sources[i]` matched.
    """

    name: str
    sources: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: Any = None

    def run(self, tensors: Mapping[str, Lazy], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The results by name; what is callable is called as late as Transformers allows."""
        if self.converter is None:
            value = tensors[self.sources[0]]
            return {self.name: value() if callable(value) else value}
        converter = deepcopy(self.converter)  # it collects tensors in itself
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            converter.add_tensor(self.name, source, pattern, tensors[source])
        try:
            results = converter.convert(self.name, model=model, config=model.config)
        except Exception as error:  # operations raise whatever torch raises
            raise CheckpointError(
                f"{self}: {type(error).__name__}: {error}",
                hint="the checkpoint's tensors are not those of the model that its config.json describes",
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}

    @property
    def operations(self) -> str:
        return "rename" if self.converter is None else " + ".join(type(op).__name__ for op in self.converter.operations)

    def __str__(self) -> str:
        sources = ", ".join(self.sources[:3]) + (f", ... ({len(self.sources)} tensors)" if self.sources[3:] else "")
        return f"{self.name} from {self.operations}({sources})"


def reading(
    keys: Iterable[str], transforms: Sequence[Any], model: PreTrainedModel
) -> tuple[list[Conversion], tuple[str, ...]]:
    """How checkpoint `keys` become entries of the model's state dict, and the keys that become none.

    Follows `convert_and_load_state_dict_in_model`. `transforms` remember which of them were used.
    """
    state = model.state_dict()
    prefix = model.base_model_prefix
    renamings, converters = _split(transforms)
    unused: list[str] = []

    def rename(key: str) -> tuple[str, str | None] | None:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # it has its name already, or lacks only the prefix
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if name in state:
            return name, pattern
        unused.append(key)
        return None

    return _group(keys, converters, rename), tuple(unused)


def writing(paths: Iterable[str], transforms: Sequence[Any]) -> list[Conversion]:
    """How entries of the state dict become tensors on disk: `transforms` undone, as `revert_weight_conversion` does."""
    try:
        renamings, converters = _split([transform.reverse_transform() for transform in reversed(transforms)])
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"Transformers cannot undo how it loads this model ({error}), so its names on disk are unknown",
            hint="save the model with save_pretrained(..., save_original_format=False) and compile that",
        ) from error
    return _group(paths, converters, lambda path: rename_source_key(path, renamings, converters, reverse=True))


def _split(transforms: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    transforms = list(transforms)
    return (
        [t for t in transforms if isinstance(t, WeightRenaming)],
        [t for t in transforms if isinstance(t, WeightConverter)],
    )


def _group(
    keys: Iterable[str], converters: Iterable[Any], rename: Callable[[str], tuple[str, str | None] | None]
) -> list[Conversion]:
    """Gather the keys that one result is made of. The order is Transformers': operations concatenate in it."""
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, list[tuple[str, str | None]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        renamed = rename(key)
        if renamed is not None:
            groups.setdefault(renamed[0], []).append((key, renamed[1]))
    return [_conversion(name, members, by_pattern) for name, members in groups.items()]


def _conversion(name: str, members: list[tuple[str, str | None]], by_pattern: Mapping[str, Any]) -> Conversion:
    sources = tuple(key for key, _ in members)
    patterns = tuple(pattern for _, pattern in members if pattern is not None)
    if not patterns and len(sources) == 1:
        return Conversion(name, sources)
    if len(patterns) < len(sources):
        raise CheckpointError(
            f"tensors {', '.join(map(repr, sources[:3]))} are all names of {name!r}: which one counts is not defined",
            hint="keep one of them in the checkpoint",
        )
    return Conversion(name, sources, patterns, by_pattern[patterns[0]])
