"""Select: how rules say which layers they mean. By structure, by name, by class, by layer, by size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator, model_validator

from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.expressions import REGEX_PREFIX, Pattern
from qcompiler.ir.annotations import Leaf, Role, Structure, need
from qcompiler.ir.fx import Node
from qcompiler.options import Options


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value if isinstance(value, tuple) or value is None else (value,)


def _structures(value: Any) -> Any:
    """Structures by name, with near names where one is unknown."""
    words = [str(s) for s in Structure]
    for word in _as_tuple(value) or ():
        if str(word) not in words:
            raise ValueError(f"unknown structure {word!r}{did_you_mean(str(word), words)}; known: {', '.join(words)}")
    return _as_tuple(value)


def _layers(value: Any) -> Any:
    for item in _as_tuple(value) or ():
        whole = isinstance(item, int) and not isinstance(item, bool)
        if not (whole or (isinstance(item, str) and _SLICE.fullmatch(item))):
            raise ValueError(f"{item!r} is neither a layer's index nor a slice like '2:-1'")
    return _as_tuple(value)


def _brief(value: tuple[Any, ...] | None) -> Any:
    return value if value is None else _word(value[0]) if len(value) == 1 else [_word(v) for v in value]


def _word(value: Any) -> str | int:
    return value if isinstance(value, int) else str(value)


_Brief = PlainSerializer(_brief)
Names = Annotated[tuple[str, ...] | None, BeforeValidator(_as_tuple), _Brief]
Layers = Annotated[tuple[int | str, ...] | None, BeforeValidator(_layers), _Brief]
Structures = Annotated[tuple[Structure, ...] | None, BeforeValidator(_structures), _Brief]
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")


class Select(Options):
    """Which leaves a rule means. Keys that are given must all hold; within a key, a list means any of it.

    name: the module path, as a glob (`*.layers.0.*`) or `re:` and a regular expression matched from the start.
    class: the module's class name. layers: decoder layers, as an index (negative from the end) or a slice "a:b".
    structure: where the leaf stands (attention-input, mlp-output, ...). min_parameters: at least so many.
    """

    model_config = ConfigDict(populate_by_name=True)

    name: Names = None
    class_: Names = Field(default=None, alias="class")
    layers: Layers = None
    structure: Structures = None
    min_parameters: int | None = Field(default=None, ge=0)

    @field_validator("name")
    @classmethod
    def _expressions(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            try:
                _pattern(name)
            except ConfigError as error:  # as a ValueError, pydantic adds where it was written
                raise ValueError(error.message) from None
        return names

    @model_validator(mode="after")
    def _says_something(self) -> Select:
        if all(getattr(self, key) is None for key in type(self).model_fields):
            raise ValueError("a select without any key: use {name: '*'} to mean every linear")
        return self

    def __str__(self) -> str:
        keys = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        parts = (f"{k}: [{', '.join(map(str, v))}]" if isinstance(v, list) else f"{k}: {v}" for k, v in keys.items())
        return "{" + ", ".join(parts) + "}"

    def unmet(self, node: Node, layer_count: int) -> list[str]:
        """The keys that do not hold for a leaf. Raises `ConfigError` for a regex that does not end."""
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


@lru_cache(maxsize=256)
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
            shown = [f"{need(n, Leaf).path} (but for {key}: {has(n, key)})" for n, key in self.near[:3]]
            return f"nearest: {'; '.join(shown)}"
        keys = [key for key in type(select).model_fields if getattr(select, key) is not None]
        return "; ".join(_there_is(key, select, nodes) for key in keys) if nodes else "the model has none"


def _there_is(key: str, select: Select, nodes: Sequence[Node]) -> str:
    """What the model has, for a key that nothing matches."""
    leaves = [need(node, Leaf) for node in nodes]
    layers = [role.layer for node in nodes if (role := need(node, Role)).layer is not None]
    match key:
        case "name":
            paths = [leaf.path for leaf in leaves]
            known = dict.fromkeys((*paths, *map(_last, paths)))
            asked = [word for name in select.name or () for word in (name, _last(name))]
            near = [did_you_mean(word, known).removeprefix("; ") for word in asked]
            return next((words for words in near if words), f"names look like {paths[0]}")
        case "class_":
            return f"the model has classes {', '.join(sorted({leaf.class_name for leaf in leaves}))}"
        case "layers":
            return f"the model has layers 0 to {max(layers)}" if layers else "the model has no layers"
        case "structure":
            return f"the model has structures {', '.join(sorted({has(node, 'structure') for node in nodes}))}"
        case _:
            return f"the largest has {max(leaf.parameters for leaf in leaves)} parameters"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def has(node: Node, key: str) -> str:
    """What a leaf has for a key of a select."""
    leaf, role = need(node, Leaf), need(node, Role)
    facts = {"name": leaf.path, "class": leaf.class_name, "layers": role.layer, "structure": role.structure}
    return str(facts.get(key, leaf.parameters))


def find(select: Select, nodes: Sequence[Node], *, layer_count: int) -> Selection:
    """Run a select over leaves. `layer_count` is the model's: it says which layer is -1."""
    unmet = [(node, select.unmet(node, layer_count)) for node in nodes]
    # A module that runs in several layers is one thing to decide on: it is meant where any of its calls is.
    modules = {need(node, Leaf).path for node, keys in unmet if not keys}
    chosen = tuple(node for node in nodes if need(node, Leaf).path in modules)
    # A single key cannot nearly hold: without another one that does, every leaf would be a near miss.
    several = sum(getattr(select, key) is not None for key in type(select).model_fields) > 1
    near = tuple((node, keys[0]) for node, keys in unmet if len(keys) == 1) if several else ()
    return Selection(chosen, near)


def idle(select: Select, nodes: Sequence[Node], *, layer_count: int) -> list[str]:
    """Names and layers in a select's lists that match no leaf at all, whatever its other keys say.

    Of classes and structures a list says "whichever this model has"; a name or a layer that is not there is a mistake.
    """
    leaves = [need(node, Leaf) for node in nodes]
    names = [f"name {n!r}" for n in select.name or () if not any(_pattern(n).matches(leaf.path) for leaf in leaves)]
    layers = range(layer_count)
    return names + [
        f"layer {item!r}"
        for item in select.layers or ()
        if not any(_in_layers(layer, (item,), layer_count) for layer in layers)
    ]
