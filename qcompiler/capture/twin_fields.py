"""A flat view of a config: every entry that says a size, with all the names the entry goes by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Field:
    """One entry of a config, of a config inside it (`attn_config.kv_n_heads`), or of its overrides for one layer."""

    owner: PreTrainedConfig | dict[str, Any]
    key: str
    names: tuple[str, ...]  # its own name, then what `attribute_map` calls it

    @property
    def value(self) -> Any:
        # Not getattr: where layers override an attribute, Transformers refuses to read it from the whole config.
        return (self.owner if isinstance(self.owner, dict) else vars(self.owner))[self.key]

    def set(self, new: Any) -> None:
        if new == self.value:
            return
        if isinstance(self.owner, dict):
            self.owner[self.key] = new
        else:
            setattr(self.owner, self.key, new)

    @property
    def counts(self) -> tuple[int, ...]:
        """The positive integers of the entry: a number, or a number for each layer or kind of layer."""
        value = self.value
        several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        return tuple(v for v in several if type(v) is int and v > 0)

    def map_counts(self, change: Mapping[int, int]) -> None:
        """Replaces the integers that `change` names, wherever they stand in the entry."""

        def new(value: Any) -> Any:
            return change.get(value, value) if type(value) is int else value

        value = self.value
        if isinstance(value, dict):
            self.set({key: new(v) for key, v in value.items()})
        elif isinstance(value, list | tuple):
            self.set(type(value)(new(v) for v in value))
        else:
            self.set(new(value))


def entry(config: PreTrainedConfig, name: str) -> Any:
    """What the whole config says about `name`, through its `attribute_map`; `None` when it says nothing."""
    return vars(config).get(getattr(config, "attribute_map", {}).get(name, name))


def layer_overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    """The entries that single layers override, by layer index."""
    overrides: dict[int, dict[str, Any]] = getattr(vars(config).get("_heterogeneity_spec"), "per_layer_overrides", {})
    return overrides


def fields(config: PreTrainedConfig) -> Iterator[Field]:
    """Every entry of `config`, of the configs inside it, and of its overrides for single layers."""
    aliases: dict[str, list[str]] = {}
    for alias, key in getattr(config, "attribute_map", {}).items():
        aliases.setdefault(key, []).append(alias)
    for owner in (config, *layer_overrides(config).values()):
        for key, value in list((owner if isinstance(owner, dict) else vars(owner)).items()):
            if isinstance(value, PreTrainedConfig):
                yield from fields(value)
            else:
                yield Field(owner, key, (key, *aliases.get(key, ())))


def named(config: PreTrainedConfig, pattern: re.Pattern[str]) -> list[Field]:
    """The entries one of whose names is `pattern`, in full."""
    return [field for field in fields(config) if any(pattern.fullmatch(name) for name in field.names)]


def rope_tables(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The config's rotary parameters: one table, or one for each kind of layer."""
    for field in named(config, re.compile(r"rope_parameters|rope_scaling")):
        table = field.value
        if isinstance(table, dict):
            yield table
            yield from (inner for inner in table.values() if isinstance(inner, dict))
