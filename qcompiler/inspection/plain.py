"""Annotations as plain data, whatever they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum

import torch
from pydantic import BaseModel, JsonValue

from qcompiler.ir.annotations import every_annotation
from qcompiler.ir.fx import Node


def plain_annotations(node: Node) -> dict[str, dict[str, JsonValue]]:
    """Every annotation of a node by the name of its type, passes' own included."""
    found: dict[str, dict[str, JsonValue]] = {}
    for annotation in every_annotation(node):
        value = plain(annotation)
        found[type(annotation).__name__] = value if isinstance(value, dict) else {"value": value}
    return dict(sorted(found.items()))


def plain(value: object) -> JsonValue:
    """Plain data for JSON; what has no form of its own there is its text. Integers of a tensor are spans, `0:128`."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(inner) for inner in value), key=str)
    if isinstance(value, torch.Tensor):
        whole = value.dim() == 1 and not value.is_floating_point() and value.device.type != "meta"
        return _spans(value.tolist()) if whole else f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return str(value)


def _spans(numbers: list[int]) -> str:
    """Consecutive numbers as `first:end`, as slices write them: a permutation of heads takes a line, not a page."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1]:
            spans[-1][1] += 1
        else:
            spans.append([number, number + 1])
    return " ".join(f"{first}:{end}" for first, end in spans)
