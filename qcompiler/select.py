"""Select: how rules say which layers they mean. By structure, by name, by class, by layer, by size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from qcompiler.emit.patterns import REGEX_PREFIX, Pattern
from qcompiler.errors import did_you_mean
from qcompiler.ir.annotations import Leaf, Role, Structure, need
from qcompiler.ir.fx import Node


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value if isinstance(value, tuple) or value is None else (value,)


def _structures(value: Any) -> Any:
    """Structures by name, with near names where one is unknown."""
    words = [str(s) for s in Structure]
    for word in _as_tuple(value) or ():
        if str(word) not in words:
            raise ValueError(f"unknown structure {word!r}{did_you_mean(str(word), words)}; known: {', '.join(words)}")
    return _as_tuple(value)


Names = Annotated[tuple[str, ...] | None, BeforeValidator(_as_tuple)]
Layers = Annotated[tuple[int | str, ...] | None, BeforeValidator(_as_tuple)]
Structures = Annotated[tuple[Structure, ...] | None, BeforeValidator(_structures)]
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")


class Select(BaseModel):
    """Which leaves a rule means. Keys that are given must all hold; within a key, a list means any of it.

    name: the module path, as a glob (`*.layers.0.*`) or `re:` and a regular expression matched from the start.
    class: the module's class name. layers: decoder layers, as an index (negative from the end) or a slice "a:b".
    structure: where the leaf stands (attention-input, mlp-output, ...). min_parameters: at least so many.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: Names = None
    class_: Names = Field(default=None, alias="class")
    layers: Layers = None
    structure: Structures = None
    min_parameters: int | None = Field(default=None, ge=0)

    @field_validator("layers")
    @classmethod
    def _slices(cls, layers: tuple[int | str, ...] | None) -> tuple[int | str, ...] | None:
        for item in layers or ():
            if isinstance(item, str) and not _SLICE.fullmatch(item):
                raise ValueError(f"layers: {item!r} is neither an index nor a slice like '2:-1'")
        return layers

    @field_validator("name")
    @classmethod
    def _expressions(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            _pattern(name)
        return names

    @model_validator(mode="after")
    def _says_something(self) -> Select:
        if not self.model_fields_set:
            raise ValueError("a select without any key: use {name: '*'} to mean every linear")
        return self

    def __str__(self) -> str:
        keys = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        parts = (f"{k}: {v[0] if isinstance(v, list) and len(v) == 1 else v}" for k, v in keys.items())
        return "{" + ", ".join(parts) + "}"

    def unmet(self, node: Node, layer_count: int) -> list[str]:
        """The keys that do not hold for a leaf; empty where it is selected."""
        leaf, role = need(node, Leaf), need(node, Role)
        unmet = []
        if self.name is not None and not any(_pattern(name).matches(leaf.path) for name in self.name):
            unmet.append("name")
        if self.class_ is not None and leaf.class_name not in self.class_:
            unmet.append("class")
        if self.layers is not None and not _in_layers(role.layer, self.layers, layer_count):
            unmet.append("layers")
        if self.structure is not None and role.structure not in self.structure:
            unmet.append("structure")
        if self.min_parameters is not None and leaf.parameters < self.min_parameters:
            unmet.append("min_parameters")
        return unmet


def _pattern(name: str) -> Pattern:
    # A glob is anchored at both ends by fnmatch; `re:` expressions match from the start, as loaders match them.
    return Pattern(name if name.startswith(REGEX_PREFIX) else REGEX_PREFIX + translate(name))


def _in_layers(layer: int | None, wanted: Sequence[int | str], count: int) -> bool:
    if layer is None:
        return False
    for item in wanted:
        if isinstance(item, int):
            if layer == (item if item >= 0 else count + item):
                return True
        else:
            start, stop = (int(part) if part else None for part in item.split(":"))
            if layer in range(*slice(start, stop).indices(count)):
                return True
    return False


@dataclass(frozen=True, slots=True)
class Selection:
    """What a select found among some leaves, and the near misses: leaves for which one key alone did not hold."""

    nodes: tuple[Node, ...]
    near: tuple[tuple[Node, str], ...]

    def explain(self, select: Select, nodes: Sequence[Node]) -> str:
        """Words for a select that found nothing."""
        if self.near:
            shown = [f"{need(n, Leaf).path} (but for {key}: {_has(n, key)})" for n, key in self.near[:3]]
            return f"nearest: {'; '.join(shown)}"
        paths = [need(node, Leaf).path for node in nodes]
        near = [did_you_mean(name, paths).removeprefix("; ") for name in select.name or ()]
        structures = sorted({str(need(node, Role).structure) for node in nodes})
        return next((n for n in near if n), f"the model has structures {', '.join(structures)}, e.g. {paths[:2]}")


def _has(node: Node, key: str) -> str:
    leaf, role = need(node, Leaf), need(node, Role)
    facts = {"name": leaf.path, "class": leaf.class_name, "layers": role.layer, "structure": role.structure}
    return str(facts.get(key, leaf.parameters))


def find(select: Select, nodes: Sequence[Node]) -> Selection:
    """Run a select over leaves. The layer count for negative indices is that of `nodes`."""
    count = 1 + max((role.layer for node in nodes if (role := need(node, Role)).layer is not None), default=-1)
    unmet = [(node, select.unmet(node, count)) for node in nodes]
    chosen = tuple(node for node, keys in unmet if not keys)
    # A single key cannot nearly hold: without another one that does, every leaf would be a near miss.
    several = len(select.model_fields_set) > 1
    near = tuple((node, keys[0]) for node, keys in unmet if len(keys) == 1) if several else ()
    return Selection(chosen, near)
