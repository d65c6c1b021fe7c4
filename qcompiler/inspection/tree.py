"""A document as the tree of its modules: layers folded, the odd ones out shown with what they differ in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.text import Text

from qcompiler.inspection.document import Document, Node
from qcompiler.inspection.fold import below, fold, outside
from qcompiler.inspection.text import (
    Styles,
    by,
    bytes_words,
    difference,
    heading,
    is_strange,
    notes,
    parts_words,
    scheme_word,
    summary,
)


@dataclass(slots=True)
class _Branch:
    """A module with what is in it; `label` says more than its name."""

    name: str
    label: Text = field(default_factory=Text)
    inside: dict[str, _Branch] = field(default_factory=dict)

    def at(self, path: Iterable[str]) -> _Branch:
        branch = self
        for name in path:
            branch = branch.inside.setdefault(name, _Branch(name))
        return branch


def tree_lines(document: Document, width: int, *, full: bool = False) -> list[Text]:
    """The modules, with the scheme and the bytes of each linear. `full`: every layer by itself."""
    styles, root = Styles(document.listed), _Branch(document.model.class_name)
    before, after = outside(document)
    for node in before:
        root.at(str(node.path).split(".")).label = _label([node], styles)
    inside = [node for node in document.leaves if node.layer is not None]
    layers = root.at(_common(inside)) if inside else root
    if full:
        for node in inside:
            root.at(str(node.path).split(".")).label = _label([node], styles)
    for found in () if full else fold(document):
        branch = layers.at([heading(found).plain])
        odd = {node.name: other for node, other in found.odd}
        for index, node in enumerate(found.nodes):
            whole = found.base is None or is_strange(found)
            if whole or node.name in odd:
                label = _label(found.alike(index), styles)
                if not whole:
                    label.append(f"  {difference(node, odd[node.name])}", style="bold yellow")
                branch.at(below(node).split(".")).label = label
    for node in after:
        root.at(str(node.path).split(".")).label = _label([node], styles)
    lines = [Text(root.name, style="bold"), *_drawn(root, "")]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return [*summary(document)[1:], Text(), *lines, *notes(document)]


def _common(nodes: Sequence[Node]) -> list[str]:
    """The names of the modules that hold all layers: `model`, `layers`."""
    parts = [str(node.path).removesuffix(below(node)).rstrip(".").split(".")[:-1] for node in nodes]
    common = parts[0]
    for other in parts:
        common = [a for a, b in zip(common, other, strict=False) if a == b]
    return common


def _label(nodes: Sequence[Node], styles: Styles) -> Text:
    first = nodes[0]
    if first.bytes is None:
        return Text(f"  {first.kind}", style="dim")
    label = Text(f"  {' '.join(filter(None, (scheme_word(first), by(first))))}", style=styles.of(first))
    label.append("  " + " ".join(filter(None, bytes_words(nodes))), style="dim")
    if first.experts is not None:
        label.append(f"  {first.experts.count} experts: {parts_words(first.experts, f'{first.path}.')}", style="dim")
    return label


def _drawn(branch: _Branch, before: str) -> Iterable[Text]:
    entries = list(branch.inside.values())
    for index, entry in enumerate(entries):
        last = index == len(entries) - 1
        line = Text(f"{before}{'└─ ' if last else '├─ '}", style="dim")
        line.append(entry.name, style="not dim bold" if entry.inside else "not dim")
        yield line.append_text(entry.label)
        yield from _drawn(entry, before + ("   " if last else "│  "))
