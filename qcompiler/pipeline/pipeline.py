"""A pipeline is a named sequence of passes and other pipelines, in Python or as YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.registry import packaged_pipelines, pass_class
from qcompiler.pipeline.safe_yaml import load_yaml


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


def load_pipeline(source: str | Path | Pipeline | list[Pass]) -> Pipeline:
    """A pipeline from a packaged name, a YAML file, or Python objects. Raises `ConfigError`."""
    if isinstance(source, Pipeline):
        return source
    if isinstance(source, list):
        return Pipeline("python", tuple(source))
    packaged = packaged_pipelines()
    if str(source) in packaged:
        return parse_pipeline(packaged[str(source)], where=f"packaged pipeline {source}")
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return parse_pipeline(path.read_text(encoding="utf-8"), where=str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"pipeline {path} cannot be read: {error}") from error
    raise ConfigError(
        f"unknown pipeline {str(source)!r}{did_you_mean(str(source), packaged)}",
        hint=f"a YAML file, or one of: {', '.join(packaged)}",
    )


def parse_pipeline(text: str, *, where: str = "pipeline") -> Pipeline:
    """A pipeline from YAML. Raises `ConfigError` naming the pass and option that are wrong, with near names."""
    return _pipeline(load_yaml(text, where=where), where)


def _pipeline(data: Any, where: str) -> Pipeline:
    if not isinstance(data, dict) or not isinstance(data.get("passes"), list):
        raise ConfigError(f"{where}: a pipeline is a mapping with `name` and a list of `passes`")
    known = ("name", "description", "passes")
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")
    items = tuple(_item(item, f"{where}: passes[{index}]") for index, item in enumerate(data["passes"]))
    return Pipeline(str(data.get("name", "pipeline")), items, str(data.get("description", "")))


def _item(data: Any, where: str) -> Pass | Pipeline:
    if isinstance(data, str):
        data = {data: {}}
    if not isinstance(data, dict) or len(data) != 1:
        raise ConfigError(f"{where}: expected the name of a pass, or one name with its options, not {data!r}")
    ((name, options),) = data.items()
    if name == "pipeline":
        return load_pipeline(options) if isinstance(options, str) else _pipeline(options, where)
    try:
        cls = pass_class(str(name))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", hint=error.hint) from None
    return build_pass(cls, options or {}, where=f"{where}.{name}")


def build_pass(cls: type[Pass], options: Any, *, where: str) -> Pass:
    """A pass from its options as plain data. Raises `ConfigError` for options that it does not take."""
    adapter = TypeAdapter(cls)
    try:
        return adapter.validate_python(options)
    except ValidationError as error:
        raise ConfigError(_say(error, adapter, where)) from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", hint=error.hint) from None


def _say(error: ValidationError, adapter: TypeAdapter[Any], where: str) -> str:
    lines = []
    for item in error.errors():
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"])
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            word = str(item["loc"][-1])
            lines.append(f"{where}{place}: unknown option{did_you_mean(word, _field_names(adapter))}")
        else:
            lines.append(f"{where}{place}: {item['msg'].removeprefix('Value error, ')}")
    return "\n".join(dict.fromkeys(lines))


def _field_names(adapter: TypeAdapter[Any]) -> set[str]:
    schema = adapter.json_schema()
    tables = [schema, *schema.get("$defs", {}).values()]
    return {name for table in tables for name in table.get("properties", {})}


def print_pipeline(pipeline: Pipeline) -> str:
    """The pipeline as YAML, options at their defaults left out: `parse_pipeline` gives it back."""
    return str(yaml.safe_dump(_plain(pipeline), sort_keys=False, width=110))


def _plain(pipeline: Pipeline) -> dict[str, Any]:
    described = {"description": pipeline.description} if pipeline.description else {}
    return {"name": pipeline.name, **described, "passes": [_plain_item(item) for item in pipeline.passes]}


def _plain_item(item: Pass | Pipeline) -> Any:
    if isinstance(item, Pipeline):
        return {"pipeline": _plain(item)}
    options = pass_options(item)
    return {item.name: options} if options else item.name


def pass_options(item: Pass) -> dict[str, Any]:
    """The options of a pass that differ from their defaults, as plain data."""
    assert dataclasses.is_dataclass(item)
    plain = TypeAdapter(type(item)).dump_python(item, mode="json", exclude_defaults=True)
    chosen = {f.name for f in dataclasses.fields(item) if getattr(item, f.name) != _default(f)}
    return {name: _without_defaults(value) for name, value in plain.items() if name in chosen}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _without_defaults(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, BaseModel) else value
