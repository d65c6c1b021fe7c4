"""What two documents say differently: schemes, bytes and errors of each layer, and nodes that only one has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict
from rich.text import Text

from qcompiler.inspection.columns import Cell, Column, laid_out
from qcompiler.inspection.document import Document, Node
from qcompiler.inspection.fold import below
from qcompiler.inspection.text import because, scheme_word, shape_word
from qcompiler.show import human, spans

_NOT_JUDGED = "not judged"
_SAME = 1e-9  # of errors, relative: a measure that is read back from JSON is the same one


class Change(BaseModel):
    """One fact of a linear or a block of experts that differs: `what`, in words `before` and `after`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    before: str
    after: str


class LayerChange(BaseModel):
    """A linear or a block of experts that differs; `only`: the side that has it, where the other does not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    name: str
    layer: int | None
    only: str | None = None
    changes: tuple[Change, ...] = ()
    bytes: tuple[int | None, int | None] = (None, None)
    error: tuple[float | None, float | None] = (None, None)


class Difference(BaseModel):
    """All that differs between `before` and `after`; `operations` counts nodes of each kind that came or went."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: str
    after: str
    facts: tuple[Change, ...]
    layers: tuple[LayerChange, ...]
    operations: dict[str, int]

    @property
    def is_empty(self) -> bool:
        return not (self.facts or self.layers or self.operations)


def compare(before: Document, after: Document, names: tuple[str, str]) -> Difference:
    """What differs between two documents, which are called `names`."""
    ours, theirs = ({str(node.path): node for node in side.listed} for side in (before, after))
    changes = []
    for path in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(path), theirs.get(path)
        if a is None or b is None:
            there = a or b
            assert there is not None
            only = names[0] if a is not None else names[1]
            changes.append(LayerChange(path=path, name=below(there), layer=there.layer, only=only))
        elif found := tuple(_changes(a, b)):
            sizes, errors = (a.bytes, b.bytes), (_error(a), _error(b))
            name, layer = below(a), a.layer
            changes.append(LayerChange(path=path, name=name, layer=layer, changes=found, bytes=sizes, error=errors))
    counts = Counter(node.op for node in after.nodes)
    counts.subtract(node.op for node in before.nodes)
    return Difference(
        before=names[0],
        after=names[1],
        facts=tuple(_facts(before, after)),
        layers=tuple(changes),
        operations={op: count for op, count in sorted(counts.items()) if count},
    )


def _facts(a: Document, b: Document) -> Iterable[Change]:
    """What differs of the whole."""
    facts = (
        ("model", a.model.class_name, b.model.class_name),
        ("layers", str(a.model.layers), str(b.model.layers)),
        ("dtype", a.model.dtype, b.model.dtype),
        ("stage", a.stage, b.stage),
        ("target", a.target or "none", b.target or "none"),
        ("key/value cache", a.kv_cache or "as it is", b.kv_cache or "as it is"),
        ("bytes of tensors", _size(a.total_bytes), _size(b.total_bytes)),
        ("bytes of files", _size(a.file_bytes), _size(b.file_bytes)),
    )
    for what, before, after in facts:
        if before != after and "" not in (before, after):
            yield Change(what=what, before=before, after=after)
    files = a.file_bytes is not None and b.file_bytes is not None
    spent = [{e.what: e.bytes for e in side.ledger if files or e.where == "tensors"} for side in (a, b)]
    for what in dict.fromkeys((*spent[0], *spent[1])):
        if spent[0].get(what, 0) != spent[1].get(what, 0) and all(spent):
            yield Change(what=what, before=_size(spent[0].get(what, 0)), after=_size(spent[1].get(what, 0)))


def _size(count: int | None) -> str:
    return f"{human(count)} ({count:,})" if count is not None else ""


def _changes(a: Node, b: Node) -> Iterable[Change]:
    facts = (
        ("shape", shape_word(a), shape_word(b)),
        ("scheme", scheme_word(a), scheme_word(b)),
        ("by", a.algorithm or "nothing", b.algorithm or "nothing"),
        ("transform", a.transform or "none", b.transform or "none"),
        ("run", str(a.run or 1), str(b.run or 1)),
        ("structure", a.structure or "none", b.structure or "none"),
        ("target", _verdict(a), _verdict(b)),
        ("observed", _observed(a), _observed(b)),
        ("because", _decided_by(a), _decided_by(b)),
    )
    for what, before, after in facts:
        if before != after and _NOT_JUDGED not in (before, after):
            yield Change(what=what, before=before, after=after)
    if a.bytes != b.bytes:
        yield Change(what="bytes", before=_size(a.bytes), after=_size(b.bytes))
    errors = (_error(a), _error(b))
    known = [error for error in errors if error is not None]
    if len(known) == 1 or (len(known) == 2 and abs(known[0] - known[1]) > _SAME * max(known)):
        yield Change(what="error", before=_number(errors[0]), after=_number(errors[1]))


def _decided_by(node: Node) -> str:
    return because(node) if node.decided else "no rule"


def _observed(node: Node) -> str:
    """What is collected for it, without the layer."""
    return ", ".join(re.sub(r"^l\d+\.", "", id) for id in node.observers) or "not"


def _verdict(node: Node) -> str:
    if node.verdict is None:
        return _NOT_JUDGED
    return "loads it" if node.verdict.legal else "refuses it"


def _error(node: Node) -> float | None:
    return node.measures.error if node.measures is not None else None


def _number(error: float | None) -> str:
    return f"{error:.2e}" if error is not None else "none"


_COLUMNS = (
    Column("layers"),
    Column(""),
    Column("what"),
    Column("before"),
    Column("after"),
    Column("bytes in all", right=True, rank=2),
    Column("error", right=True, rank=1),
)


def diff_lines(found: Difference, width: int) -> list[Text]:
    """The difference as lines; layers that changed alike share one."""
    lines = [Text(f"{found.before} → {found.after}", style="bold")]
    if found.is_empty:
        return [*lines, Text("nothing differs")]
    facts = [[Cell(c.what), Cell(c.before, "red"), Cell(c.after, "green")] for c in found.facts]
    lines += laid_out((Column(""), Column("before"), Column("after")), facts, width, titles=False) if facts else []
    if found.operations:
        counts = ", ".join(f"{op} {count:+}" for op, count in found.operations.items())
        lines.append(Text(f"  nodes: {counts}"))
    alike: dict[tuple[object, ...], list[LayerChange]] = {}
    for layer in found.layers:
        alike.setdefault(_kind(layer), []).append(layer)
    rows = [row for members in alike.values() for row in _rows(members)]
    if rows:
        lines += [Text(), *laid_out(_COLUMNS, rows, width)]
    same = "" if found.layers else "every layer is decided alike"
    return [*lines, Text(same)] if same else lines


def _kind(layer: LayerChange) -> tuple[object, ...]:
    """What layers share that are told in one line: what changed into what, but for measures and layers' numbers."""
    words = [(c.what, c.before, c.after) for c in layer.changes if c.what not in ("error", "bytes")]
    measured = tuple(c.what for c in layer.changes if c.what in ("error", "bytes"))
    return (layer.name, layer.only, measured, re.sub(r"\bl\d+\.", "l*.", repr(words)))


def _rows(members: Sequence[LayerChange]) -> Iterable[list[Cell]]:
    """A line for each fact that changed; what it cost stands in the first."""
    first = members[0]
    layers = spans(member.layer for member in members if member.layer is not None)
    sums = [[m.bytes[side] for m in members if m.bytes[side] is not None] for side in (0, 1)]
    sizes = [sum(size for size in side if size is not None) for side in sums]
    cost = f"{human(sizes[0])} → {human(sizes[1])}" if all(sums) and sizes[0] != sizes[1] else ""
    means = [_mean([m.error[side] for m in members]) for side in (0, 1)]
    error = f"{_number(means[0])} → {_number(means[1])}" if means[0] != means[1] else ""
    if first.only is not None:
        yield [Cell(layers), Cell(first.name), Cell("only in"), Cell(first.only), *[Cell("")] * 3]
        return
    told = [change for change in first.changes if change.what not in ("bytes", "error")]
    if not told:
        yield [Cell(layers), Cell(first.name), *[Cell("")] * 3, Cell(cost), Cell(error)]
    for index, change in enumerate(told):
        head = (layers, first.name, cost, error) if index == 0 else ("", "", "", "")
        yield [
            *(Cell(head[0]), Cell(head[1]), Cell(change.what, "dim")),
            *(Cell(change.before, "red"), Cell(change.after, "green"), Cell(head[2]), Cell(head[3])),
        ]


def _mean(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if known else None
