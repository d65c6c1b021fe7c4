"""A pipeline is a named sequence of passes and other pipelines, in Python or as YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.registry import NESTED, packaged_pipelines, pass_class
from qcompiler.pipeline.safe_yaml import Place, dump_yaml, load_yaml

_MAX_BYTES = 1 << 20


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


def load_pipeline(source: str | Path | Pipeline | Sequence[Pass | Pipeline]) -> Pipeline:
    """A pipeline from a packaged name, a YAML file, or Python objects, whose options are checked as YAML's are.

    Raises `ConfigError`.
    """
    if isinstance(source, Pipeline):
        return _checked(source)
    if isinstance(source, (str, Path)):
        return _load(str(source), _Reading(Path()))
    return _checked(Pipeline("python", tuple(source)))


def parse_pipeline(text: str, *, where: str = "pipeline") -> Pipeline:
    """A pipeline from YAML. Raises `ConfigError` naming line, pass and option that are wrong, with near names."""
    return _parse(text, where, _Reading(Path()))


@dataclass(frozen=True, slots=True)
class _Reading:
    """Where relative files are looked for, and which pipelines are being read around this one."""

    folder: Path
    within: tuple[str, ...] = ()


def _load(name: str, reading: _Reading) -> Pipeline:
    packaged = packaged_pipelines()
    if name in packaged:
        return _parse(packaged[name], f"packaged pipeline {name}", reading)
    path = reading.folder / name
    try:
        if path.suffix not in (".yaml", ".yml") and not path.is_file():
            raise ConfigError(
                f"unknown pipeline {name!r}{did_you_mean(name, packaged)}",
                hint=f"a YAML file, or one of: {', '.join(packaged)}",
            )
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes: not a pipeline")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no name that a file can have
        raise ConfigError(f"pipeline {name!r} cannot be read: {error}") from error
    return _parse(text, str(path), dataclasses.replace(reading, folder=path.parent))


def _parse(text: str, where: str, reading: _Reading) -> Pipeline:
    if where in reading.within:
        raise ConfigError(f"{where} contains itself: {' -> '.join((*reading.within, where))}")
    data, place = load_yaml(text, where=where)
    return _pipeline(data, place, dataclasses.replace(reading, within=(*reading.within, where)))


def _pipeline(data: Any, place: Place, reading: _Reading) -> Pipeline:
    if not isinstance(data, dict) or not isinstance(data.get("passes"), list):
        raise ConfigError(f"{place}: a pipeline is a mapping with `name` and a list of `passes`")
    known = ("name", "description", "passes")
    for key, value in data.items():
        if key not in known:
            raise ConfigError(f"{place.at(key)}: unknown key{did_you_mean(key, known)}")
        if key != "passes" and not isinstance(value, str):
            raise ConfigError(f"{place.at(key)}: expected text, not {value!r}")
    items = tuple(_item(item, place.at("passes", index), reading) for index, item in enumerate(data["passes"]))
    return Pipeline(data.get("name", "pipeline"), items, data.get("description", ""))


def _item(data: Any, place: Place, reading: _Reading) -> Pass | Pipeline:
    if isinstance(data, str):
        data = {data: None}
    if not isinstance(data, dict) or len(data) != 1:
        raise ConfigError(f"{place}: expected the name of a pass, or one name with its options, not {data!r}")
    ((name, options),) = data.items()
    inner = place.at(name)
    if name == NESTED:
        return _load(options, reading) if isinstance(options, str) else _pipeline(options, inner, reading)
    try:
        cls = pass_class(name)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error.message}", hint=error.hint) from None
    if options is not None and not isinstance(options, dict):
        raise ConfigError(f"{inner}: options of a pass are a mapping, not {options!r}")
    return build_pass(cls, options or {}, place=inner)


def build_pass(cls: type[Pass], options: dict[str, Any], *, place: Place) -> Pass:
    """A pass from its options as plain data. Raises `ConfigError` for options that it does not take."""
    adapter = TypeAdapter(cls)
    try:
        return adapter.validate_python(options)
    except ValidationError as error:
        raise ConfigError(_say(error, adapter, place)) from error


def _say(error: ValidationError, adapter: TypeAdapter[Any], place: Place) -> str:
    lines = []
    for item in error.errors():
        where = place.at(*item["loc"])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            word = str(item["loc"][-1])
            lines.append(f"{where}: unknown option{did_you_mean(word, _field_names(adapter))}")
        elif item["type"] in ("missing", "missing_argument"):
            lines.append(f"{where}: this option is missing")
        else:
            # Pydantic's place goes on into the members of a union, which no one wrote.
            shown = where.known() if where.root is not None else where
            lines.append(f"{shown}: {item['msg'].removeprefix('Value error, ')}")
    return "\n".join(dict.fromkeys(lines))


def _field_names(adapter: TypeAdapter[Any]) -> set[str]:
    schema = adapter.json_schema()
    tables = [schema, *schema.get("$defs", {}).values()]
    return {name for table in tables for name in table.get("properties", {})}


def _checked(pipeline: Pipeline) -> Pipeline:
    """The pipeline with the options of every pass validated: a list where a tuple belongs becomes one."""
    items: list[Pass | Pipeline] = []
    for index, item in enumerate(pipeline.passes):
        if isinstance(item, Pipeline):
            items.append(_checked(item))
            continue
        place = Place(f"pipeline {pipeline.name}").at("passes", index)
        if not isinstance(item, Pass):
            hint = f"write {item.__name__}()" if isinstance(item, type) else None
            raise ConfigError(f"{place}: expected a pass or a Pipeline, not {item!r}", hint=hint)
        options = {f.name: getattr(item, f.name) for f in dataclasses.fields(_as_dataclass(item)) if f.init}
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
    chosen = [f.name for f in dataclasses.fields(_as_dataclass(item)) if getattr(item, f.name) != _default(f)]
    return {name: brief.get(name) or whole[name] for name in chosen}  # `{}` says less than the defaults it stands for


def _as_dataclass(item: Pass) -> Any:
    """A pass as what the registry has checked it to be; the type system cannot say "subclasses are dataclasses"."""
    assert dataclasses.is_dataclass(item), f"{type(item).__name__} is a pass, and no dataclass"
    return item


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
