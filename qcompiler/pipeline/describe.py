"""Passes and pipelines in words, generated from the registry."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, get_type_hints

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
    hints = get_type_hints(cls)
    assert dataclasses.is_dataclass(cls)
    lines += [f"    {f.name}: {_type_name(hints[f.name])}{_default(f)}" for f in dataclasses.fields(cls)]
    return "\n".join(lines) + "\n"


def _type_name(hint: Any) -> str:
    """`Literal['error', 'dense']`, `tuple[Rule, ...]`: no module names."""
    plain = isinstance(hint, type) and not getattr(hint, "__args__", None)
    return hint.__name__ if plain else re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", str(hint))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    return "" if field.default_factory is dataclasses.MISSING else f" = {field.default_factory()!r}"
