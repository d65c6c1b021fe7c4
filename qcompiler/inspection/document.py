"""The document that every view reads: a graph with all that is known and decided about it, as plain data.

It is frozen, has a version, and is equal after a trip through JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

from qcompiler.errors import CheckpointError, ConfigError, did_you_mean

SCHEMA_VERSION: Literal[1] = 1
_MAX_BYTES = 1 << 30

Outcome = Literal["decides", "overridden", "hidden", "missed"]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelFacts(_Data):
    """The model. `config` has sizes and switches of its config, `parameters` counts each tied one once."""

    name: str
    class_name: str
    dtype: str
    layers: int
    parameters: int
    config: dict[str, int | float | str | bool] = {}


class PassRun(_Data):
    """A pass of the pipeline: its name (numbered where it comes twice), the stage it leaves, seconds where it ran."""

    name: str
    stage: str
    seconds: float | None = None


class Work(_Data):
    """A kind of work, and its seconds in all."""

    what: str
    seconds: float


class PipelineFacts(_Data):
    """The pipeline as YAML, its passes in order, and the last that ran before this was read: `capture`, or a pass.

    `streaming` is the work that several passes share while weights are streamed.
    """

    name: str
    text: str
    passes: tuple[PassRun, ...]
    streaming: tuple[Work, ...] = ()
    after: str


class Candidate(_Data):
    """A rule that was weighed for a linear: who it is, what it selects, what it would make of it, and what came of it.

    `missed` rules lack one key; `because` says which. `hidden` ones match what an ignore took away.
    """

    who: str
    selects: str
    becomes: str
    outcome: Outcome
    because: str = ""


class Verdict(_Data):
    """Whether the document's target loads a linear: the kernel that takes it, or each broken rule with its mend."""

    legal: bool
    kernel: str | None = None
    problems: tuple[str, ...] = ()
    mends: tuple[str, ...] = ()


class Measures(_Data):
    """What was measured while compiling; see `LayerRow` for the meaning of each."""

    error: float | None = None
    output_error: float | None = None
    nearest_output_error: float | None = None
    damping: float | None = None
    dead_columns: int | None = None
    ratio: float | None = None
    transform_gain: float | None = None
    seconds: float | None = None


class Experts(_Data):
    """What a block of experts stands for: `count` experts, whose projections have these `names`, `*` for the number.

    First the names that runtimes look for, then those of tensors on disk where they differ.
    """

    count: int
    names: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Whether this is the name of one projection of one of them."""
        found = starred(name)
        return found is not None and found[0] in self.names and found[1] < self.count

    def ends(self, name: str) -> bool:
        """Whether the name of one of them ends so."""
        found = starred(name)
        return found is not None and found[1] < self.count and any(n.endswith(f".{found[0]}") for n in self.names)


def starred(name: str) -> tuple[str, int] | None:
    """A name with `*` for the last number in it, and that number; None where it has none."""
    parts = name.split(".")
    last = next((place for place in reversed(range(len(parts))) if parts[place].isdecimal()), None)
    if last is None:
        return None
    return ".".join([*parts[:last], "*", *parts[last + 1 :]]), int(parts[last])


class Node(_Data):
    """One node of the graph.

    `name` is what the printed IR calls it, `inputs` the names of the nodes it reads, `shape` that of its value (`B` and
    `S` where it depends on batch and sequence). `kind` is that of a leaf (`linear`, `norm`, ...), else `operation`,
    `inserted` (by a pass), `input`, `attribute` or `output`. `weight_shape` is [out, in] of a linear. `bytes` are what
    a linear or a block of experts takes on disk, None for nodes that are not listed. `experts`: what a block of them
    stands for. `nearest`: what a linear without a structure nearly is. `decided`: a rule or an ignore spoke; the scheme
    may still be None, for dense. `observes` is the statistic that an `observe` node collects, `observers` are those
    collected for a linear. `annotations` has every annotation as passes left it, by its type.
    """

    name: str
    op: str
    kind: str
    inputs: tuple[str, ...] = ()
    arguments: str = ""
    shape: tuple[str, ...] | None = None
    partition: str | None = None
    module: str | None = None
    path: str | None = None
    class_name: str | None = None
    parameters: int | None = None
    weight_shape: tuple[int, int] | None = None
    experts: Experts | None = None
    structure: str | None = None
    nearest: str | None = None
    layer: int | None = None
    input_group: str | None = None
    fusion_group: str | None = None
    decided: bool = False
    scheme: dict[str, JsonValue] | None = None
    scheme_name: str | None = None
    format: str | None = None
    algorithm: str | None = None
    solver: str | None = None
    transform: str | None = None
    run: int | None = None
    because: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    observes: str | None = None
    observers: tuple[str, ...] = ()
    verdict: Verdict | None = None
    bytes: int | None = None
    dense_bytes: int | None = None
    bits_per_weight: float | None = None
    measures: Measures | None = None
    annotations: dict[str, dict[str, JsonValue]] = {}


class Group(_Data):
    """Nodes that belong together.

    An `input` group reads one tensor, of `producer`; a `fusion` group is fused by runtimes; a `rescale` group takes
    a scale from `producer`; an `observer` group shares a statistic. `details` are the annotation's.
    """

    id: str
    kind: Literal["input", "fusion", "rescale", "observer"]
    members: tuple[str, ...]
    producer: str | None = None
    words: str = ""
    details: dict[str, JsonValue] = {}


class LedgerEntry(_Data):
    """Bytes of one kind of thing; `where` is what holds them: `tensors`, or `files` besides them."""

    what: str
    bytes: int
    where: Literal["tensors", "files"] = "tensors"


class NoteText(_Data):
    """What a user should know; see `Note`."""

    kind: Literal["info", "warning", "fallback"]
    text: str


class Document(_Data):
    """Everything that was read of one graph. `total_bytes` are those of all tensors, predicted or on disk.

    The ledger's entries add up to `file_bytes` where there are files, else to `total_bytes`. `dense_bytes` are those of
    the model as it was.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    source: Literal["model", "graph", "checkpoint"]
    model: ModelFacts
    stage: str
    pipeline: PipelineFacts | None = None
    target: str | None = None
    kv_cache: str | None = None
    config_summary: str = ""
    nodes: tuple[Node, ...]
    groups: tuple[Group, ...] = ()
    ledger: tuple[LedgerEntry, ...] = ()
    total_bytes: int | None = None
    dense_bytes: int | None = None
    file_bytes: int | None = None
    notes: tuple[NoteText, ...] = ()

    @model_validator(mode="after")
    def _names_lead_somewhere(self) -> Self:
        names = {node.name for node in self.nodes}
        if len(names) < len(self.nodes):
            raise ValueError("two nodes have one name")
        for node in self.nodes:
            if unknown := [name for name in node.inputs if name not in names]:
                raise ValueError(f"{node.name} reads {unknown[0]}, which is no node")
        for group in self.groups:
            wanted = (*group.members, *([group.producer] if group.producer is not None else []))
            if unknown := [name for name in wanted if name not in names]:
                raise ValueError(f"{group.kind} group {group.id} has the member {unknown[0]}, which is no node")
        return self

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def leaves(self) -> tuple[Node, ...]:
        """The modules of the graph, each once, in the order in which they run."""
        found: dict[str, Node] = {}
        for node in self.nodes:
            if node.path is not None:
                found.setdefault(node.path, node)
        return tuple(found.values())

    @cached_property
    def listed(self) -> tuple[Node, ...]:
        """Linears and blocks of experts: what holds weights that a rule could mean."""
        return tuple(node for node in self.leaves if node.kind in LISTED_KINDS)

    @cached_property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """By name of a node, the nodes that read it."""
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node.name)
        return {name: tuple(readers) for name, readers in found.items()}

    def groups_of(self, name: str) -> tuple[Group, ...]:
        """The groups of this id, one of each kind at most; none where it is the name of a node."""
        return tuple(group for group in self.groups if group.id == name) if not any(self._aliases(name)) else ()

    def find(self, name: str) -> Node:
        """The node of this module path, expert's weight or IR name (`%` or not). Raises `ConfigError`: near names."""
        wanted = name.removeprefix("%")
        for node in self._aliases(wanted):
            return node
        paths = dict.fromkeys(node.path for node in self.nodes if node.path is not None)
        known = dict.fromkeys([*paths, *(node.name for node in self.nodes), *(group.id for group in self.groups)])
        inside = [path for path in paths if wanted and f".{wanted}." in f".{path}."]
        inside += [str(node.path) for node in self.nodes if node.experts is not None and node.experts.ends(wanted)]
        if inside:
            shown = ", ".join(inside[:3]) + (f" and {len(inside) - 3} more" if inside[3:] else "")
            raise ConfigError(
                f"{name!r} is not one module's whole path; it is part of {shown}", hint=f"say {inside[0]}"
            )
        raise ConfigError(
            f"the graph has no node {name!r}{did_you_mean(wanted, known) or self._near_end(wanted, paths)}",
            hint="give a module's path, a node's name or a group's, as `qcompiler inspect --full` lists them",
        )

    def _near_end(self, wanted: str, paths: Iterable[str]) -> str:
        """Near names among the ends of paths, as whole paths: the first of those that end alike."""
        depth = wanted.count(".") + 1
        ends: dict[str, str] = {}
        for path in paths:
            ends.setdefault(".".join(path.split(".")[-depth:]), path)
        near = [ends[end] for end in get_close_matches(wanted, ends, n=2, cutoff=0.6)]
        return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""

    def _aliases(self, wanted: str) -> Iterator[Node]:
        yield from (node for node in self.nodes if node.path == wanted)
        if wanted in self.by_name:
            yield self.by_name[wanted]
        yield from (node for node in self.nodes if node.experts is not None and node.experts.holds(wanted))

    def as_json(self) -> str:
        """JSON, what is at its default left out; `parse_document` gives the document back."""
        return self.model_dump_json(indent=1, exclude_defaults=True) + "\n"


LISTED_KINDS = frozenset({"linear", "conv1d", "bare-linear", "experts"})
"""Kinds of nodes that are lines of a listing: what holds the weights that a rule could mean."""


def read_document(file: Path) -> Document:
    """A document from a JSON export. Raises `CheckpointError` where the file is none, or is too large."""
    hint = "give a file that `qcompiler inspect --export FILE.json` wrote"
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{file} is larger than {_MAX_BYTES} bytes: no export of a graph", hint=hint)
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}", hint=hint) from error
    return parse_document(data, where=str(file), hint=hint)


def parse_document(data: str | bytes, *, where: str, hint: str | None = None) -> Document:
    """A document from its JSON. Raises `CheckpointError` that names `where` and the entry that is wrong."""
    try:
        return Document.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        more = f" ({_shown(first['input'])})" if place == "schema_version" else ""
        words = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{where} is no exported graph: {place}: {words}{more}", hint=hint) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
