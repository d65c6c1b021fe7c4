"""A document as lines: what a person reads in a terminal, layers that are alike folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.text import Text

from qcompiler.inspection.columns import Cell, Column, laid_out
from qcompiler.inspection.document import LISTED_KINDS, Document, Experts, Node
from qcompiler.inspection.fold import Fold, below, fold, outside
from qcompiler.show import human, spans

_PALETTE = ("cyan", "green", "magenta", "yellow", "blue", "bright_red", "bright_green", "bright_magenta")
DENSE = "dense"
TIMES = "\N{MULTIPLICATION SIGN}"

COLUMNS = (
    Column(""),
    Column("stands", rank=4),
    Column("shape", right=True, rank=6),
    Column("scheme"),
    Column("by"),
    Column("fused", rank=7),
    Column("bits/weight", right=True, rank=3),
    Column("bytes", right=True),
    Column("all layers", right=True, rank=1),
    Column("error", right=True, rank=1),
    Column("worst", rank=2),
    Column("output error", right=True, rank=2),
    Column("target", rank=5),
    Column("because", rank=8),
    Column("differs"),
)


class Styles:
    """A colour for each scheme, in the order in which schemes appear: the same in every view of a document."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        names = dict.fromkeys(node.scheme_name for node in nodes if node.scheme_name)
        self._of = {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(names)}

    def of(self, node: Node) -> str:
        if node.verdict is not None and not node.verdict.legal:
            return "bold red"
        return self._of[node.scheme_name] if node.scheme_name else "dim"


def text_lines(document: Document, width: int) -> list[Text]:
    """One line for each linear and block of experts."""
    styles, folds = Styles(document.listed), fold(document)
    before, after = outside(document)
    lines = [*summary(document), Text()]
    blocks: list[tuple[Text | None, list[list[Cell]]]] = []
    blocks.append((None, [_row(str(n.path), [n], styles) for n in before if _is_listed(n)]))
    blocks += [(heading(found), _fold_rows(found, styles)) for found in folds]
    rest = [_row(str(n.path), [n], styles) for n in after if _is_listed(n)]
    blocks.append((Text("after the layers", style="bold") if rest and folds else None, rest))
    # All blocks share their columns, so that a scheme stands under a scheme.
    laid = laid_out(COLUMNS, [row for _, rows in blocks for row in rows], width)
    lines.append(laid.pop(0))
    for title, rows in blocks:
        if title is not None:
            lines.append(title)
        lines += laid[: len(rows)]
        del laid[: len(rows)]
    return [*lines, *_experts(folds), *notes(document)]


def full_lines(document: Document) -> list[Text]:
    """Every node, as the printed IR has it."""
    styles = Styles(document.listed)
    return [*summary(document), Text(), *(_ir_line(node, styles) for node in document.nodes), *notes(document)]


def summary(document: Document) -> list[Text]:
    """What was read: the model, how far the pipeline went, the bytes."""
    model = document.model
    first = Text(model.class_name, style="bold")
    layers = f"{model.layers} layer{'s' * (model.layers != 1)}"
    first.append(f"  {layers}, {count(model.parameters)} parameters, {model.dtype}  {model.name}", style="not bold")
    lines = [first]
    if document.pipeline is not None:
        target = f", for {document.target}" if document.target else ""
        lines.append(Text(f"{document.pipeline.name} after {document.pipeline.after} ({document.stage}){target}"))
    else:
        judged = document.target is not None and any(node.verdict is not None for node in document.listed)
        lines.append(Text(document.stage + (f", judged for {document.target}" if judged else "")))
    if document.total_bytes is not None:
        saved = ""
        if document.dense_bytes and document.total_bytes and document.dense_bytes != document.total_bytes:
            ratio = document.dense_bytes / document.total_bytes
            saved = f", {ratio:.2f} times smaller than {human(document.dense_bytes)}"
        files = f"; {document.file_bytes:,} in files" if document.file_bytes is not None else ""
        size = f"{human(document.total_bytes)} of tensors ({document.total_bytes:,} bytes{files}){saved}"
        lines.append(Text(size))
    if document.kv_cache is not None:
        lines.append(Text(f"key/value cache: {document.kv_cache}"))
    return lines


def notes(document: Document) -> list[Text]:
    styles = {"info": "dim", "warning": "yellow", "fallback": "yellow"}
    words = [("note" if note.kind == "info" else note.kind, note) for note in document.notes]
    found = [Text(f"{kind}: {note.text}", style=styles[note.kind]) for kind, note in words]
    return [Text(), *found] if found else []


def heading(found: Fold) -> Text:
    """`layers 1-30`, or `layer 31: as layers 1-30, but`."""
    words = layers_words(found.layers)
    if found.base is None:
        return Text(words + (" are alike" if len(found.layers) > 1 else ""), style="bold")
    line = Text(f"{words}: as {layers_words(found.base.layers)}", style="bold")
    return line.append(", but" if found.odd else "") if not is_strange(found) else Text(words, style="bold")


def is_strange(found: Fold) -> bool:
    """Whether a fold differs from the common one in so much that it is shown whole."""
    return found.base is not None and (2 * len(found.odd) > len(found.nodes) or bool(found.missing))


def layers_words(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {spans(layers)}"


def difference(node: Node, other: Node | None) -> str:
    """What the counterpart has in place of what is odd here."""
    if other is None:
        return "only here"
    if node.scheme_name != other.scheme_name or node.decided != other.decided:
        return f"there {scheme_word(other)}"
    if node.algorithm != other.algorithm or node.transform != other.transform:
        return f"there by {by(other)}"
    if node.weight_shape != other.weight_shape:
        return f"there {shape_word(other)}"
    if node.structure != other.structure:
        return f"there {other.structure or other.kind}"
    if node.because != other.because:
        return f"there {because(other)}"
    return "there otherwise"


def scheme_word(node: Node) -> str:
    return node.scheme_name or DENSE


def by(node: Node) -> str:
    return node.algorithm or ""


def because(node: Node) -> str:
    return ", ".join(node.because)


def shape_word(node: Node) -> str:
    return "x".join(map(str, node.weight_shape)) if node.weight_shape else ""


def count(number: int) -> str:
    """`8.03B`, `124M`, `990`."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def braced(names: Sequence[str]) -> str:
    """Names in one line, those of one parent together: `mlp.{up_proj, down_proj}`."""
    parents: list[tuple[str, list[str]]] = []
    for name in names:
        parent, _, last = name.rpartition(".")
        if parents and parent and parents[-1][0] == parent:
            parents[-1][1].append(last)
        else:
            parents.append((parent, [last]))
    shown = [(f"{parent}." if parent else "", ", ".join(last), len(last)) for parent, last in parents]
    return ", ".join(f"{parent}{{{last}}}" if several > 1 else f"{parent}{last}" for parent, last, several in shown)


def parts_words(experts: Experts, prefix: str = "") -> str:
    """The names that a block of experts stands for, `prefix` left out: `mlp.experts.{0-7}.{up_proj, down_proj}`."""
    return braced([name.removeprefix(prefix) for name in experts.names]).replace("*", f"{{0-{experts.count - 1}}}")


def _experts(folds: Sequence[Fold]) -> list[Text]:
    """What blocks of experts stand for, each kind once."""
    told: dict[str, None] = {}
    for node in (node for found in folds for node in found.nodes):
        if node.experts is not None:
            prefix = str(node.path).removesuffix(below(node))
            told[f"{below(node)} is {node.experts.count} experts in one: {parts_words(node.experts, prefix)}"] = None
    return [Text(f"  {words}", style="dim") for words in told]


def _is_listed(node: Node) -> bool:
    return node.kind in LISTED_KINDS


def _fold_rows(found: Fold, styles: Styles) -> list[list[Cell]]:
    odd = {node.name: other for node, other in found.odd}
    rows = []
    for index, node in enumerate(found.nodes):
        shown = found.base is None or is_strange(found) or node.name in odd
        if _is_listed(node) and shown:
            differs = difference(node, odd[node.name]) if node.name in odd and not is_strange(found) else ""
            rows.append(_row(below(node), found.alike(index), styles, differs))
    return rows


def _row(name: str, nodes: Sequence[Node], styles: Styles, differs: str = "") -> list[Cell]:
    first, style = nodes[0], styles.of(nodes[0])
    each, together = bytes_words(nodes)
    fused = first.fusion_group or ""
    return [
        Cell(name),
        Cell(first.structure or first.kind, "dim"),
        Cell(shape_word(first) or (count(first.parameters) if first.parameters else ""), "dim"),
        Cell(scheme_word(first), style),
        Cell(by(first), style),
        Cell(fused.partition(".")[2] if first.layer is not None and fused.startswith("l") else fused, "dim"),
        Cell(f"{first.bits_per_weight:.2f}" if first.bits_per_weight is not None else ""),
        Cell(each),
        Cell(together),
        Cell(mean_of(nodes, "error")),
        Cell(_worst(nodes)),
        Cell(mean_of(nodes, "output_error")),
        Cell(_target(first), "bold red" if first.verdict and not first.verdict.legal else "dim"),
        Cell(because(first), "dim"),
        Cell(differs, "bold yellow"),
    ]


def bytes_words(nodes: Sequence[Node]) -> tuple[str, str]:
    """The bytes of one, and those of all where they are several: `2.52 KiB` and `x3 = 7.55 KiB`."""
    sizes = [node.bytes for node in nodes if node.bytes is not None]
    if not sizes:
        return "", ""
    mean = "" if len(set(sizes)) == 1 else " on average"
    together = f"{TIMES}{len(sizes)} = {human(sum(sizes))}" if len(sizes) > 1 else ""
    return f"{human(sum(sizes) // len(sizes))}{mean}", together


def mean_of(nodes: Sequence[Node], key: str) -> str:
    """The mean of what was measured; empty where nothing was."""
    values = [value for _, value in measured(nodes, key)]
    return f"{sum(values) / len(values):.2e}" if values else ""


def measured(nodes: Sequence[Node], key: str) -> list[tuple[int | None, float]]:
    """A measure of each node that has it, by layer."""
    found = [(node.layer, getattr(node.measures, key)) for node in nodes if node.measures is not None]
    return [(layer, float(value)) for layer, value in found if value is not None]


def _worst(nodes: Sequence[Node]) -> str:
    """The layer with the largest error, where there are several."""
    found = measured(nodes, "error")
    if len(found) < 2:
        return ""
    layer, most = max(found, key=lambda pair: pair[1])
    return f"{most:.2e} in layer {layer}"


def _target(node: Node) -> str:
    if node.verdict is None:
        return ""
    return node.verdict.kernel or "" if node.verdict.legal else "refused"


def _ir_line(node: Node, styles: Styles) -> Text:
    shape = f" [{','.join(node.shape)}]" if node.shape is not None else ""
    if node.kind == "output":
        return Text(f"return {node.arguments}")
    line = Text(f"%{node.name} = {node.op}")
    line.append(f"{shape}" if node.kind in ("input", "attribute") else f"({node.arguments}){shape}", style="dim")
    if node.decided:
        decided = " ".join(filter(None, (scheme_word(node), by(node))))
        line.append(f"  {decided}", style=styles.of(node))
    facts = [node.structure, f"group={node.fusion_group}" if node.fusion_group else None]
    facts += [f"id={node.observes}" if node.observes else None]
    facts += [f"{node.experts.count} experts" if node.experts is not None else None]
    line.append("".join(f"  {fact}" for fact in facts if fact))
    line.append(f"  ; {because(node)}" if node.decided or node.observes else "", style="dim")
    return line
