"""The options of passes, read off their types: a table is a dataclass or a pydantic model, and holds options.

An option's value may hold tables itself, as the rules of `assign` do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, get_args, get_type_hints

from pydantic import BaseModel

REQUIRED: Final = dataclasses.MISSING
"""The default of an option that has none."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option by the name that people write."""

    name: str
    type: Any
    default: Any = REQUIRED


def tables_in(kind: Any) -> list[type]:
    """The tables that a value of this type may be or hold, outermost: `Rule` for `tuple[Rule, ...] | None`."""
    if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, BaseModel)):
        return [kind]
    return [table for part in get_args(kind) for table in tables_in(part)]


def options_of(table: Any) -> list[Option]:
    """The options of a table, a class."""
    hints = get_type_hints(table, include_extras=True)
    if issubclass(table, BaseModel):
        return [
            Option(
                field.alias or name,
                hints[name],
                REQUIRED if field.is_required() else field.get_default(call_default_factory=True),
            )
            for name, field in table.model_fields.items()
        ]
    return [
        Option(field.name, hints[field.name], field.default if made is REQUIRED else made())
        for field in dataclasses.fields(table)
        if field.init
        for made in (field.default_factory,)
    ]


def options_at(table: type, path: Iterable[str | int]) -> set[str]:
    """The names of options where `path` leads to from a table. Steps that no type knows (into a list) are passed."""
    tables = [table]
    for step in path:
        deeper = [inner for t in tables for o in options_of(t) if o.name == step for inner in tables_in(o.type)]
        tables = deeper or tables
    return {option.name for found in tables for option in options_of(found)}


def tables_below(table: type) -> list[type]:
    """Every table that the options of a table lead to, nearest first."""
    found: dict[type, None] = {}
    todo = [table]
    while todo:
        met = [inner for option in options_of(todo.pop(0)) for inner in tables_in(option.type)]
        new = [inner for inner in dict.fromkeys(met) if inner not in found]
        found |= dict.fromkeys(new)
        todo += new
    return list(found)
