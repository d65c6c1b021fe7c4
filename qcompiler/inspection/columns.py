"""Lines in columns that fit a width: the columns that matter least are left out, and names are shortened last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

_GAP = "  "
_ELLIPSIS = "…"
_LEAST = 12  # of the first column, before it is cut no more


@dataclass(frozen=True, slots=True)
class Column:
    """`rank`: those of the highest ranks go first where the width is short; 0 stays."""

    title: str
    right: bool = False
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    style: str = ""


def laid_out(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int, *, indent: int = 2, titles: bool = True
) -> list[Text]:
    """A line for each row, no wider than `width` as far as ranks allow; columns that are empty are left out."""
    head = [Cell(column.title if titles else "", "dim") for column in columns]
    shown = [i for i, _ in enumerate(columns) if any(row[i].text for row in rows)]
    sizes = {i: max(len(row[i].text) for row in (head, *rows)) for i in shown}
    while _total(sizes, indent) > width and (least := max(shown, key=lambda i: columns[i].rank, default=None)):
        if not columns[least].rank:
            break
        shown.remove(least)
        del sizes[least]
    over = _total(sizes, indent) - width
    if shown and over > 0:
        sizes[shown[0]] = max(min(sizes[shown[0]], _LEAST), sizes[shown[0]] - over)
    lines = [head, *rows] if titles else list(rows)
    return [_line([row[i] for i in shown], [(sizes[i], columns[i].right) for i in shown], indent) for row in lines]


def _total(sizes: dict[int, int], indent: int) -> int:
    return indent + sum(sizes.values()) + len(_GAP) * max(len(sizes) - 1, 0)


def _line(cells: Sequence[Cell], sizes: Sequence[tuple[int, bool]], indent: int) -> Text:
    line = Text(" " * indent)
    for index, (cell, (size, right)) in enumerate(zip(cells, sizes, strict=True)):
        text = cut(cell.text, size)
        line.append(_GAP if index else "")
        line.append(text.rjust(size) if right else text.ljust(size), style=cell.style or None)
    line.rstrip()
    return line


def cut(text: str, size: int) -> str:
    """The text, or its two ends where it is longer: the last part of a path says most."""
    if len(text) <= size:
        return text
    if size <= 1:
        return _ELLIPSIS[:size]
    end = (size - 1) * 2 // 3
    return text[: size - 1 - end] + _ELLIPSIS + text[len(text) - end :]
