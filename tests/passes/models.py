"""Captured models to run passes on: each is captured once, and every run works on a copy of its graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qcompiler.capture import capture_graph
from qcompiler.ir.graph import Graph
from qcompiler.pipeline import Context, Pipeline, parse_pipeline
from qcompiler.pipeline.manager import prepare_streaming_passes, run_graph_passes
from qcompiler.report import Report
from qcompiler.source import ModelSource
from tests.capture.models import captured, on_meta

Item = str | Mapping[str, Any]
"""A pass as pipelines write it: `"legalize"`, or `{"legalize": {"target": "sglang"}}`."""


@cache
def block() -> Graph:
    """A Llama of one layer, with grouped heads, and sizes that the groups of all presets divide."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 2}
    return capture_graph(on_meta("llama", layers=1, **sizes))


@cache
def recurrent() -> Graph:
    """A model that runs its one layer of a kind twice."""
    return capture_graph(on_meta("hrm_text", H_cycles=1, L_cycles=2, num_layers_per_stack=1))


@dataclass(frozen=True, slots=True)
class Run:
    """What came of some passes."""

    graph: Graph
    report: Report
    source: ModelSource

    @property
    def notes(self) -> list[tuple[str, str]]:
        return [(note.kind, note.text) for note in self.report.notes]


def assign(*rules: Mapping[str, Any], **options: Any) -> Item:
    """The pass `assign` with these rules."""
    return {"assign": {"rules": list(rules), **options}}


def rule(
    scheme: str | Mapping[str, Any] | None, *, optional: bool = False, override: bool = False, **select: Any
) -> Mapping[str, Any]:
    """A rule of `assign`; `select` are its keys, `class_` standing for `class`."""
    keys = {key.rstrip("_"): value for key, value in select.items()}
    said = {"optional": optional, "override": override}
    return {"select": keys, "scheme": scheme, **{key: value for key, value in said.items() if value}}


def copied(graph: Graph) -> Graph:
    """A graph of the same model that can be edited alone."""
    return replace(graph, fx=copy.deepcopy(graph.fx))


def pipeline(*passes: Item) -> Pipeline:
    return parse_pipeline(yaml.safe_dump({"name": "test", "passes": list(passes)}))


def run(graph: Graph | str, *passes: Item, target: str | None = None, folder: Path = Path("no files")) -> Run:
    """Run passes on a copy of a graph, or of the tiny model of that type, as a plan does: verified after each.

    target: as from the command line. folder: where the model's files lie.
    """
    graph = copied(captured(graph) if isinstance(graph, str) else graph)
    config = getattr(graph.model, "config", None)  # a renamed model is a bare tree of modules
    context = Context(ModelSource(folder, config, graph.model), Report(), target=target)
    chosen = pipeline(*passes)
    run_graph_passes(graph, chosen, context)
    prepare_streaming_passes(graph, chosen, context)
    return Run(graph, context.report, context.source)
