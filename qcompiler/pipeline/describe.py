"""Passes and pipelines in words, generated from the registry. Types and defaults read as one writes them in YAML."""

from __future__ import annotations

import inspect
import math
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, TypeAdapter

from qcompiler.options import REQUIRED, Option, options_of, tables_below
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.pipeline import parse_pipeline
from qcompiler.pipeline.registry import packaged_pipelines, pass_classes


def describe_passes() -> str:
    """Every installed pass: stages, what it does, options with types and defaults."""
    return "\n".join(_describe(cls) for cls in pass_classes().values())


def describe_pipelines() -> str:
    """Every packaged pipeline with its description."""
    rows = [(name, parse_pipeline(text, where=name).description) for name, text in packaged_pipelines().items()]
    width = max((len(name) for name, _ in rows), default=0)
    return "packaged pipelines\n" + "".join(f"  {name:<{width}}  {text}\n" for name, text in rows)


def _describe(cls: type[Pass]) -> str:
    before = " or ".join(str(stage) for stage in sorted(cls.requires))
    after = f" -> {cls.ensures}" if cls.ensures is not None else ""
    text = inspect.cleandoc(cls.__doc__ or "")
    lines = [f"{cls.name}  ({before}{after})", *(f"  {line}".rstrip() for line in text.splitlines())]
    lines += [f"    {line}" for line in _options(cls)]
    for table in tables_below(cls):
        if options := _options(table):
            lines += [f"    {_type_words(table)}:", *(f"      {line}" for line in options)]
    return "\n".join(lines) + "\n"


def _options(table: type) -> list[str]:
    return [f"{option.name}: {_type_words(option.type)}{_default(option)}" for option in options_of(table)]


def _type_words(kind: Any) -> str:
    """A type as what is written in YAML: `error | dense`, `[Rule, ...]`, `int | null`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_words(parts[0])
    if origin is Literal:
        return " | ".join(_words(part) for part in parts)
    if origin in (Union, UnionType):
        return " | ".join(_type_words(part) for part in parts)
    if origin is tuple:
        return f"[{', '.join('...' if part is Ellipsis else _type_words(part) for part in parts)}]"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " | ".join(_words(member.value) for member in kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(name := getattr(kind, "name", None), str):
        return name  # options that are chosen by name
    return _PLAIN.get(kind) or str(getattr(kind, "__name__", kind))


_PLAIN = {NoneType: "null", str: "text"}


def _default(option: Option) -> str:
    if option.default is REQUIRED:
        return ""
    return f" = {_words(TypeAdapter(option.type).dump_python(option.default, mode='json', by_alias=True))}"


def _words(value: Any) -> str:
    """Plain data as YAML writes it in one line."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=math.inf)).removesuffix("...\n").strip()
