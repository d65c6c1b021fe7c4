"""Exports for other tools keep everything, and come back."""

from __future__ import annotations

import re
from pathlib import Path

import networkx as nx
import pytest

from qcompiler.errors import CheckpointError, ConfigError
from qcompiler.inspection.document import Document
from qcompiler.inspection.export import check_place, export, from_networkx, to_networkx, writer_of
from qcompiler.inspection.read import read, read_graph
from tests.capture.models import captured


@pytest.fixture
def documents(points: dict[str, Document], stored: Document) -> list[Document]:
    return [*points.values(), stored, read_graph(captured("mixtral"))]


def test_a_trip_through_networkx_keeps_everything(documents: list[Document]) -> None:
    for document in documents:
        assert from_networkx(to_networkx(document)) == document


def test_a_trip_through_graphml_keeps_everything(documents: list[Document], tmp_path: Path) -> None:
    for document in documents:
        export(document, tmp_path / "graph.graphml")
        assert from_networkx(nx.read_graphml(tmp_path / "graph.graphml")) == document


def test_a_json_export_is_read_back(documents: list[Document], tmp_path: Path) -> None:
    for document in documents:
        export(document, tmp_path / "graph.json")
        assert read(tmp_path / "graph.json") == document


def test_annotations_are_attributes_of_nodes_and_edges_are_dataflow(points: dict[str, Document]) -> None:
    graph = to_networkx(points["insert-observers"])
    node = graph.nodes["l0.self_attn.q_proj"]
    assert (node["scheme_name"], node["input_group"], node["layer"]) == ("w:int4/g16", "l0.attention-input", 0)
    assert '"transform": {"grid": 20' in node["annotations"]
    assert nx.is_directed_acyclic_graph(graph)
    assert nx.has_path(graph, "input_ids", "output")
    assert "l0.input_layernorm" in nx.ancestors(graph, "l0.self_attn.q_proj")


def test_dot_has_every_node_edge_and_attribute_well_quoted(points: dict[str, Document], tmp_path: Path) -> None:
    document = points["insert-observers"]
    export(document, tmp_path / "graph.dot")
    text = (tmp_path / "graph.dot").read_text(encoding="utf-8")
    quoted = r'"(?:[^"\\]|\\.)*"'
    statement = re.compile(rf"  ({quoted}) (?:-> ({quoted}) )?\[((?:\w+=(?:{quoted}|\d+) ?)*)\]")
    found = [match for line in text.splitlines() if (match := statement.fullmatch(line))]
    others = [line for line in text.splitlines() if not statement.fullmatch(line)]
    assert all(
        re.fullmatch(rf"digraph {{|  node \[.*\]|  subgraph cluster_\d+ {{ label={quoted}|  }}|}}", line)
        for line in others
    )
    graph = to_networkx(document)
    assert {match[1].strip('"') for match in found if not match[2]} == set(graph.nodes)
    assert {(match[1].strip('"'), match[2].strip('"')) for match in found if match[2]} == set(graph.edges)
    (query,) = (match[3] for match in found if match[1] == '"l0.self_attn.q_proj"' and not match[2])
    assert 'scheme_name="w:int4/g16"' in query
    assert {"annotations", "candidates", "observers"} <= set(re.findall(r"(\w+)=", query))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("graph.jsn", "no export is called '.jsn'; did you mean '.json'?"),
        ("graph", "no export is called 'graph'"),
    ],
)
def test_files_that_cannot_be_written_are_refused_first(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        writer_of(tmp_path / name)


def test_a_folder_that_is_not_there_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        check_place(tmp_path / "nowhere" / "graph.dot", overwrite=True)


def test_a_graph_of_another_tool_is_refused(points: dict[str, Document]) -> None:
    graph = to_networkx(points["capture"])
    graph.nodes["l0.self_attn.q_proj"]["annotations"] = "{"
    with pytest.raises(CheckpointError, match="attribute annotations is no JSON"):
        from_networkx(graph)
    with pytest.raises(CheckpointError, match="source: Field required"):
        from_networkx(nx.DiGraph())
