"""A document for other tools: as a networkx graph and back, and as .dot, .graphml and .json files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx

from qcompiler.errors import CheckpointError, ConfigError, did_you_mean
from qcompiler.inspection.document import Document, Node, parse_document

_PLAIN = (str, int, float, bool)
_COLOURS = ("#a6cee3", "#b2df8a", "#cab2d6", "#ffff99", "#fdbf6f", "#fb9a99", "#8dd3c7", "#bebada")


def to_networkx(document: Document) -> nx.DiGraph:
    """The document as a directed graph: nodes by name, an edge for each value that a node reads, `position` its place.

    Attributes are plain values, and JSON where they have parts, so that every format of networkx can hold them.
    """
    data = document.model_dump(mode="json", exclude_defaults=True)
    nodes = data.pop("nodes")
    graph = nx.DiGraph(**_flat({"schema_version": document.schema_version, **data}))
    for index, node in enumerate(nodes):
        name = node.pop("name")
        graph.add_node(name, **_flat({"index": index, **node}))
    for node in document.nodes:
        for position, source in enumerate(node.inputs):
            graph.add_edge(source, node.name, position=position)
    return graph


def from_networkx(graph: nx.DiGraph) -> Document:
    """The document of a graph that `to_networkx` made, whatever file it went through. Raises `CheckpointError`."""
    nodes = sorted(graph.nodes(data=True), key=lambda item: int(item[1].get("index", 0)))
    data = {
        **_deep(graph.graph, Document),
        "nodes": [
            {"name": name, **_deep({k: v for k, v in attributes.items() if k != "index"}, Node)}
            for name, attributes in nodes
        ],
    }
    return parse_document(json.dumps(data), where="the graph")


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, _PLAIN) else json.dumps(v) for k, v in fields.items() if v is not None}


def _deep(attributes: dict[str, Any], model: type[Document] | type[Node]) -> dict[str, Any]:
    """Attributes as they were before `_flat`: what the model holds as text is text, all else was JSON."""
    found: dict[str, Any] = {}
    for key, value in attributes.items():
        field = model.model_fields.get(key)
        if field is None:
            continue  # networkx's own, such as `node_default`
        text = field.annotation in (str, str | None) or key in ("source", "kind")
        try:
            found[key] = json.loads(value) if isinstance(value, str) and not text else value
        except ValueError as error:
            raise CheckpointError(
                f"attribute {key} is no JSON: {value[:60]!r}", hint="give a graph that qcompiler exported"
            ) from error
    return found


def export(document: Document, file: Path) -> None:
    """Write a document in the format of the file's suffix, over what is there.

    Raises `ConfigError` for another suffix or a bad place.
    """
    write = writer_of(file)
    try:
        write(document, file)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}", hint="choose another file") from error


def writer_of(file: Path) -> Callable[[Document, Path], None]:
    """What writes files of this suffix. Raises `ConfigError` for another suffix."""
    if file.suffix not in _WRITERS:
        near = did_you_mean(file.suffix, _WRITERS) if file.suffix else ""
        raise ConfigError(
            f"no export is called {file.suffix or file.name!r}{near}", hint=f"end it in {', '.join(_WRITERS)}"
        )
    return _WRITERS[file.suffix]


def check_place(file: Path, *, overwrite: bool) -> None:
    """Raises `ConfigError` where a file of this name cannot be made, or is there and shall stay."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        wrong = "it is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        raise ConfigError(f"{file} cannot be written: {wrong}", hint="choose another file")
    if file.is_file() and not overwrite:
        raise ConfigError(f"{file} exists", hint="choose another file, or pass --overwrite to replace it")


def _write_json(document: Document, file: Path) -> None:
    file.write_text(document.as_json(), encoding="utf-8")


def _write_graphml(document: Document, file: Path) -> None:
    nx.write_graphml(to_networkx(document), file, encoding="utf-8")


def _write_dot(document: Document, file: Path) -> None:
    """Graphviz's language: clusters for partitions, a colour for each scheme, all attributes of the networkx graph."""
    graph = to_networkx(document)
    schemes = dict.fromkeys(node.scheme_name for node in document.nodes if node.scheme_name)
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(schemes)}
    lines = ["digraph {", '  node [shape=box style="rounded,filled" fillcolor=white fontname=sans]']
    parts: dict[str | None, list[Node]] = {}
    for node in document.nodes:
        parts.setdefault(node.partition, []).append(node)
    for index, (part, nodes) in enumerate(parts.items()):
        if part is not None:
            lines.append(f"  subgraph cluster_{index} {{ label={_quoted(part)}")
        for node in nodes:
            label = "\n".join(filter(None, (node.name, node.op, node.scheme_name)))
            drawn = {"label": label, "fillcolor": colours.get(node.scheme_name or "", "white")}
            words = " ".join(f"{key}={_quoted(value)}" for key, value in {**graph.nodes[node.name], **drawn}.items())
            lines.append(f"  {_quoted(node.name)} [{words}]")
        if part is not None:
            lines.append("  }")
    lines += [f"  {_quoted(a)} -> {_quoted(b)} [position={p}]" for a, b, p in graph.edges(data="position")]
    file.write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")


def _quoted(value: object) -> str:
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"'


_WRITERS: dict[str, Callable[[Document, Path], None]] = {
    ".json": _write_json,
    ".graphml": _write_graphml,
    ".dot": _write_dot,
}
