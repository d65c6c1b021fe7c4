"""The options of passes, read off their types: a table is a dataclass or a pydantic model, and holds options.

An option's value may hold tables itself, as the rules of `assign` do. `Options` is the base of those in pydantic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails

from qcompiler.errors import ConfigError, did_you_mean

REQUIRED: Final = dataclasses.MISSING
"""The default of an option that has none."""


class Options(BaseModel):
    """A frozen table. Made in Python of what it does not take, it raises `ConfigError` that names the argument."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    if not TYPE_CHECKING:  # checkers see the arguments by their names

        def __init__(self, **options: Any) -> None:
            try:
                super().__init__(**options)
            except ValidationError as error:
                raise _wrong_arguments(error, type(self)) from error

        # So that a table within a pipeline is validated without it, and its mistakes get their places in the file.
        __init__.__pydantic_base_init__ = True


@dataclass(frozen=True, slots=True)
class Option:
    """An option by the name that people write."""

    name: str
    type: Any
    default: Any = REQUIRED


def named_table(tables: Mapping[str, type[BaseModel]], name: str, options: Any) -> BaseModel:
    """The table of a name from `{name: options}`; the way to its mistakes leads over the name."""
    try:
        return tables[name].model_validate(options or {})
    except ValidationError as error:
        found: list[InitErrorDetails] = []
        for item in error.errors():
            details = InitErrorDetails(type=item["type"], loc=(name, *item["loc"]), input=item["input"])
            found.append({**details, "ctx": item["ctx"]} if "ctx" in item else details)
        raise ValidationError.from_exception_data(error.title, found) from None


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
    return {option.name for found in _tables_at(table, path) for option in options_of(found)}


def _tables_at(table: type, path: Iterable[str | int]) -> list[type]:
    tables = [table]
    for step in path:
        deeper = [inner for t in tables for o in options_of(t) if o.name == step for inner in tables_in(o.type)]
        tables = deeper or [table for table in tables if _is_named(table, step)] or tables
    return tables


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


def _wrong_arguments(error: ValidationError, cls: type[Options]) -> ConfigError:
    """A line for each argument that a table does not take, by its way from there; the hint says what is taken there."""
    lines: dict[str, None] = {}
    takes: dict[str, None] = {}
    for item in error.errors():
        known = _known_part(item["loc"], cls)
        tables = _tables_at(cls, known)
        here = {table.__name__: _arguments(table) for table in tables if _arguments(table) or len(tables) == 1}
        way = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in known).lstrip(".")
        if item["type"] == "extra_forbidden":
            word = str(item["loc"][-1])
            near = did_you_mean(word, [name for arguments in here.values() for name in arguments])
            lines[f"{way}.{word}".lstrip(".") + f": {' or '.join(here)} has no such argument{near}"] = None
        elif item["type"] == "missing":
            lines[f"{way}: this argument is missing"] = None
        else:
            words = item["msg"].removeprefix("Value error, ")
            lines[f"{way or cls.__name__}={brief(item['input'])}: {words[:1].lower()}{words[1:]}"] = None
        takes |= {f"{table} takes {', '.join(arguments) or 'no arguments'}": None for table, arguments in here.items()}
    return ConfigError("\n".join(lines), hint="; ".join(takes))


def _known_part(loc: tuple[str | int, ...], cls: type[Options]) -> list[str | int]:
    """As much of pydantic's way as someone wrote: it goes on into the members of unions."""
    known: list[str | int] = []
    for step in loc:
        tables = _tables_at(cls, known)
        if isinstance(step, str) and not any(
            step in _arguments(t) or step in options_at(t, ()) or _is_named(t, step) for t in tables
        ):
            break
        known.append(step)
    return known


def _is_named(table: type, step: str | int) -> bool:
    """Whether a step is the name by which one of several tables is chosen, as in `solver: {gptq: {...}}`."""
    return isinstance(step, str) and getattr(table, "name", None) == step


def _arguments(table: type) -> list[str]:
    """What Python calls the options of a table: `class` is a word of its own there."""
    return list(table.model_fields) if issubclass(table, BaseModel) else [option.name for option in options_of(table)]
