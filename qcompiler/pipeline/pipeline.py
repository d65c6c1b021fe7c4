"""A pipeline is a named sequence of passes and other pipelines, in Python or as YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qcompiler.collector import collector_paused
from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.options import options_at, options_of
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.registry import (
    NESTED,
    check_pass_class,
    packaged_pipelines,
    pass_class,
    pass_names,
    readers,
)
from qcompiler.pipeline.safe_yaml import Place, dump_yaml, load_yaml

_SUFFIXES = (".yaml", ".yml")
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32  # pipelines within pipelines
_MAX_READ = 100  # pipelines read for one: a file that names another ten times, and so on, would explode
_FLATTEN = "write the passes of the inner pipelines out, in one list"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What is done to a model, in order. Nested pipelines run in their place."""

    name: str
    passes: tuple[Pass | Pipeline, ...]
    description: str = ""

    def flat(self) -> Iterator[Pass]:
        """The passes in the order in which they run."""
        for item in self.passes:
            if isinstance(item, Pipeline):
                yield from item.flat()
            else:
                yield item


@collector_paused()
def load_pipeline(source: str | Path | Pipeline | Sequence[Pass | Pipeline]) -> Pipeline:
    """A pipeline from a packaged name, a YAML file, or Python objects, whose options are checked as YAML's are.

    Raises `ConfigError`.
    """
    if isinstance(source, Pipeline):
        return _checked(source)
    if isinstance(source, (str, Path)):
        return _load(str(source), _Reading(Path()))
    return _checked(Pipeline("python", source))  # type: ignore[arg-type]  # any sequence: it is checked


def parse_pipeline(text: str, *, where: str = "pipeline") -> Pipeline:
    """A pipeline from YAML. Raises `ConfigError` naming line, pass and option that are wrong, with near names."""
    return _parse(text, where, _Reading(Path()))


@dataclass(frozen=True, slots=True)
class _Reading:
    """Where relative files are looked for, which pipelines are being read around this one, and how many were read.

    `within` are those that have a name of their own, by what makes them the same: a file, however its path is spelled.
    """

    folder: Path
    within: Mapping[str, str] = field(default_factory=dict)
    depth: int = 0
    read: list[str] = field(default_factory=list)

    def deeper(self, place: Place) -> _Reading:
        if self.depth == _MAX_DEPTH:
            raise ConfigError(f"{place}: more than {_MAX_DEPTH} pipelines within one another", hint=_FLATTEN)
        return dataclasses.replace(self, depth=self.depth + 1)

    def enter(self, identity: str, where: str) -> _Reading:
        if identity in self.within:
            raise ConfigError(
                f"{where} contains itself: {' -> '.join((*self.within.values(), where))}",
                hint="take out the `pipeline:` that leads back",
            )
        self.read.append(where)
        if len(self.read) > _MAX_READ:
            raise ConfigError(f"{self.read[0]}: more than {_MAX_READ} pipelines are read for it", hint=_FLATTEN)
        return dataclasses.replace(self, within={**self.within, identity: where})


def _load(name: str, reading: _Reading, place: Place | None = None) -> Pipeline:
    """The pipeline of this name; `place` is where another one names it."""
    packaged = packaged_pipelines()
    if name in packaged:
        return _parse(packaged[name], f"packaged pipeline {name}", reading)
    said = f"{place}: " if place is not None else ""
    path = reading.folder / name
    try:
        if name and path.is_dir():
            raise ConfigError(
                f"{said}pipeline {name!r} is a folder{did_you_mean(name, packaged)}",
                hint=f"give a YAML file in it, or one of: {', '.join(packaged)}",
            )
        if not path.is_file() and (path.suffix not in _SUFFIXES or path.exists()):
            raise ConfigError(
                f"{said}unknown pipeline {name!r}{did_you_mean(name, packaged)}",
                hint=f"a YAML file, or one of: {', '.join(packaged)}",
            )
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(
                f"{said}{path} is larger than {_MAX_BYTES} bytes: not a pipeline", hint="give a YAML file of passes"
            )
        text = path.read_text(encoding="utf-8")
        identity = str(path.resolve())
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no name that a file can have
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{said}pipeline {name!r} cannot be read: {reason}", hint="give a YAML file, or a packaged pipeline's name"
        ) from error
    return _parse(text, str(path), dataclasses.replace(reading, folder=path.parent), identity)


def _parse(text: str, where: str, reading: _Reading, identity: str | None = None) -> Pipeline:
    inside = reading.enter(identity or where, where)
    data, place = load_yaml(text, where=where)
    if isinstance(data, dict) and "passes" in data:
        return _pipeline(data, place, inside)
    translated = next((found for read in readers() if (found := read(data, place)) is not None), None)
    if translated is not None:
        return _pipeline(translated, Place(f"{where}, translated"), inside)
    return _pipeline(data, place, inside)


def _pipeline(data: Any, place: Place, reading: _Reading) -> Pipeline:
    known = ("name", "description", "passes")
    for key, value in data.items() if isinstance(data, dict) else ():
        if key not in known:
            raise ConfigError(
                f"{place.at(key)}: unknown key{did_you_mean(key, known)}",
                hint="a pipeline has a `name`, a `description` and a list of `passes`",
            )
        if key != "passes" and not isinstance(value, str):
            raise ConfigError(f"{place.at(key)}: expected text, not {value!r}", hint="write words, or put it in quotes")
    if not isinstance(data, dict) or not isinstance(data.get("passes"), list):
        raise ConfigError(
            f"{place}: a pipeline is a mapping with `name` and a list of `passes`",
            hint="write `passes:` and a line like `- legalize` for each; `qcompiler passes` lists them",
        )
    items = tuple(_item(item, place.at("passes", index), reading) for index, item in enumerate(data["passes"]))
    return Pipeline(data.get("name", "pipeline"), items, data.get("description", ""))


def _item(data: Any, place: Place, reading: _Reading) -> Pass | Pipeline:
    if isinstance(data, str):
        data = {data: None}
    if not isinstance(data, dict) or len(data) != 1:
        raise ConfigError(
            f"{place}: expected the name of a pass, or one name with its options, not {data!r}",
            hint="write `- legalize`, or `- legalize: {option: value}`; `qcompiler passes` lists them",
        )
    ((name, options),) = data.items()
    inner = place.at(name)
    if name == NESTED:
        deeper = reading.deeper(inner)
        return _load(options, deeper, inner) if isinstance(options, str) else _pipeline(options, inner, deeper)
    try:
        cls = pass_class(name)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error.message}", hint=error.hint) from None
    if options is not None and not isinstance(options, dict):
        raise ConfigError(
            f"{inner}: options of a pass are a mapping, not {options!r}",
            hint=f"write `{name}: {{option: value}}`; {_takes(cls)}",
        )
    return build_pass(cls, options or {}, place=inner)


def build_pass(cls: type[Pass], options: dict[str, Any], *, place: Place) -> Pass:
    """A pass from its options as plain data. Raises `ConfigError` for options that it does not take."""
    adapter = TypeAdapter(cls)
    try:
        return adapter.validate_python(options)
    except ValidationError as error:
        raise ConfigError(wrong_options(error, cls, place), hint=_takes(cls)) from error


def _takes(cls: type[Pass]) -> str:
    """Where to read what a pass takes: one that is not installed is in no list."""
    if cls.name in pass_names():
        return f"`qcompiler passes` lists what {cls.name} takes"
    return f"{cls.name} takes {', '.join(option.name for option in options_of(cls)) or 'no options'}"


def wrong_options(error: ValidationError, cls: type, place: Place) -> str:
    """A line for each option that a table (a pass, a model) does not take, with where it is written."""
    lines = []
    for item in error.errors():
        where = place.at(*item["loc"])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            *table, word = item["loc"]
            lines.append(f"{where}: unknown option{did_you_mean(str(word), options_at(cls, table))}")
        elif item["type"] in ("missing", "missing_argument"):
            lines.append(f"{where}: this option is missing")
        else:
            # Pydantic's place goes on into the members of a union, which no one wrote.
            shown = where.known() if where.root is not None else where
            words = _EXPECTED.get(item["type"]) or item["msg"].removeprefix("Value error, ")
            lines.append(f"{shown}: {words}")
    return "\n".join(dict.fromkeys(lines))


_EXPECTED = {
    "dataclass_type": "expected a mapping",
    "model_type": "expected a mapping",
    "string_type": "expected text",
    "tuple_type": "expected a list",
}
"""Pydantic's words are Python's, and pipelines are written in YAML."""


def _checked(pipeline: Pipeline, depth: int = 0) -> Pipeline:
    """The pipeline with the options of every pass validated: a list where a tuple belongs becomes one."""
    here = Place(f"pipeline {pipeline.name}")
    if not isinstance(pipeline.name, str) or not isinstance(pipeline.description, str):
        raise ConfigError(
            f"{here}: its name and its description are text", hint='write Pipeline("mine", passes, description="...")'
        )
    if not isinstance(pipeline.passes, Sequence):
        raise ConfigError(
            f"{here}: expected a sequence of passes and pipelines, not {pipeline.passes!r}",
            hint="give a packaged pipeline's name, a YAML file, or a list of passes",
        )
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{here}: more than {_MAX_DEPTH} pipelines within one another", hint=_FLATTEN)
    items: list[Pass | Pipeline] = []
    for index, item in enumerate(pipeline.passes):
        if isinstance(item, Pipeline):
            items.append(_checked(item, depth + 1))
            continue
        place = here.at("passes", index)
        if not isinstance(item, Pass):
            hint = f"write {item.__name__}()" if isinstance(item, type) else "write objects, e.g. [Legalize(), Lower()]"
            raise ConfigError(f"{place}: expected a pass or a Pipeline, not {item!r}", hint=hint)
        check_pass_class(type(item), f"{place}: {type(item).__name__}")
        options = {option.name: getattr(item, option.name) for option in options_of(type(item))}
        items.append(build_pass(type(item), options, place=place.at(item.name)))
    return dataclasses.replace(pipeline, passes=tuple(items))


def print_pipeline(pipeline: Pipeline) -> str:
    """The pipeline as YAML, options at their defaults left out: `parse_pipeline` gives it back."""
    return dump_yaml(_plain(pipeline))


def _plain(pipeline: Pipeline) -> dict[str, Any]:
    described = {"description": pipeline.description} if pipeline.description else {}
    return {"name": pipeline.name, **described, "passes": [_plain_item(item) for item in pipeline.passes]}


def _plain_item(item: Pass | Pipeline) -> Any:
    if isinstance(item, Pipeline):
        return {NESTED: _plain(item)}
    options = pass_options(item)
    return {item.name: options} if options else item.name


def pass_options(item: Pass) -> dict[str, Any]:
    """The options of a pass that differ from their defaults, as plain data."""
    adapter = TypeAdapter(type(item))
    brief = adapter.dump_python(item, mode="json", by_alias=True, exclude_defaults=True)
    whole = adapter.dump_python(item, mode="json", by_alias=True)
    chosen = [option.name for option in options_of(type(item)) if getattr(item, option.name) != option.default]
    return {name: brief.get(name) or whole[name] for name in chosen}  # `{}` says less than the defaults it stands for
