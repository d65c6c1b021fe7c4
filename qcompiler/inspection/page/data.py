"""A document as the page reads it: nodes by number, and what many of them share written once."""

from __future__ import annotations

import json
import re
from typing import Any

from qcompiler.inspection.dataflow import Dataflow
from qcompiler.inspection.document import Document, Node
from qcompiler.inspection.fold import facts

_TOLD = frozenset({"Leaf", "Role", "Quant", "Scope"})  # annotations whose every fact is a field of the node
_OWN = frozenset({"name", "path", "inputs"})
_SHARE = 0.1  # a field with more different values per node than this is not worth sharing
_DIGITS = 6
_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,14})(?![0-9])")  # such as JavaScript writes back alike


def page_data(document: Document) -> dict[str, Any]:
    """What the scripts need, as plain data for JSON.

    Fields that differ between most nodes are columns in `nodes.own`. The others are in profiles, of which
    `nodes.profile` gives each node's: places in `nodes.values`, in its order. Nodes refer to each other by their place.
    """
    places = {node.name: place for place, node in enumerate(document.nodes)}
    listed = {node.name for node in document.listed}
    residual = Dataflow(document).residual
    kinds: dict[object, int] = {}
    rows = [
        {**_fields(node, listed=node.name in listed, kinds=kinds), "inputs": sorted({places[i] for i in node.inputs})}
        for node in document.nodes
    ]
    for node, row in zip(document.nodes, rows, strict=True):
        if node.name in residual:
            row["residual"] = True
    return {
        "nodes": _shared(rows),
        "target": document.target,
        "groups": [
            {
                "id": group.id,
                "kind": group.kind,
                "words": group.words,
                "members": [places[name] for name in group.members],
                "producer": None if group.producer is None else places[group.producer],
            }
            for group in document.groups
        ],
    }


def column_of(path: str, layer: int) -> tuple[str, str]:
    """A path below its layer, and the same with every number in it as `*`: the projection it is."""
    below = re.search(rf"(?:^|\.){layer}\.(.+)", path)
    short = below[1] if below else path
    return short, re.sub(r"(?<![^.])\d+(?![^.])", "*", short)


def _fields(node: Node, *, listed: bool, kinds: dict[object, int]) -> dict[str, Any]:
    """A node's facts, flat; those without a value are left out. `alike`: one number for weights that are alike."""
    plain = node.model_dump(mode="json", exclude_defaults=True)
    plain |= plain.pop("measures", {})
    annotations = {name: facts for name, facts in plain.pop("annotations", {}).items() if name not in _TOLD}
    if annotations:
        plain["annotations"] = annotations
    if listed:
        plain["weighted"] = True
        plain["alike"] = kinds.setdefault(facts(node), len(kinds))
        plain["where_because"] = node.annotations.get("Role", {}).get("because")
    if node.path is not None and node.layer is not None:
        plain["short"], plain["column"] = column_of(node.path, node.layer)
    return {name: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value for name, value in plain.items()}


def _shared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    facts: dict[str, dict[object, Any]] = {name: {} for name in names}
    for row in rows:
        for name in names:
            facts[name].setdefault(_key(row.get(name)), row.get(name))
    shared = [name for name in names if name not in _OWN and len(facts[name]) <= _SHARE * len(rows)]
    places = {name: {key: place for place, key in enumerate(facts[name])} for name in shared}
    profiles: dict[tuple[int, ...], int] = {}
    return {
        "profile": [
            profiles.setdefault(tuple(places[name][_key(row.get(name))] for name in shared), len(profiles))
            for row in rows
        ],
        "profiles": list(profiles),
        "values": {name: list(facts[name].values()) for name in shared},
        "own": {name: _column([row.get(name) for row in rows]) for name in names if name not in shared},
    }


def _key(fact: Any) -> object:
    """What two facts are the same by."""
    return json.dumps(fact) if isinstance(fact, (dict, list)) else (type(fact), fact)


def _column(values: list[Any]) -> dict[str, Any]:
    """Values as they are or, where all are text, as patterns: what stands between numbers, and the numbers."""
    if not all(value is None or isinstance(value, str) for value in values):
        return {"plain": values}
    patterns: dict[tuple[str, ...], int] = {}
    cells: list[list[int] | None] = []
    for value in values:
        if value is None:
            cells.append(None)
            continue
        pieces = tuple(_NUMBER.split(value))
        cells.append([patterns.setdefault(pieces, len(patterns)), *map(int, _NUMBER.findall(value))])
    return {"patterns": list(patterns), "cells": cells}
