"""What people read in the terminal: plans and reports as tables. Layers that are alike share a line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from qcompiler.report import LayerRow, Report


def folded(rows: Iterable[LayerRow]) -> list[tuple[str, list[LayerRow]]]:
    """Rows that differ only in their layer, together: `layers 0-31 self_attn.q_proj`."""
    groups: dict[tuple[object, ...], list[LayerRow]] = {}
    for row in rows:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.path) if row.layer is not None else row.path
        groups.setdefault((name, row.scheme, row.structure, row.shape, row.because), []).append(row)
    return [(str(key[0]), members) for key, members in groups.items()]


def print_report(report: Report, console: Console) -> None:
    """The report: a line per kind of layer, totals, notes, times."""
    table = Table(title=f"{report.model}: {report.pipeline} for {report.target}", title_justify="left", box=None)
    for column, right in _COLUMNS:
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for name, rows in folded(report.layers):
        table.add_row(*_cells(name, rows))
    console.print(table)
    saved = report.dense_total_bytes / report.total_bytes if report.total_bytes else 0.0
    console.print(
        f"\n{human(report.total_bytes)} of tensors ({report.total_bytes:,} bytes), "
        f"{saved:.2f} times smaller than {human(report.dense_total_bytes)}"
    )
    if report.config_summary:
        console.print(f"config: {report.config_summary}")
    for note in report.notes:
        console.print(f"{'note' if note.kind == 'info' else note.kind}: {note.text}", markup=False)
    spent = "  ".join(f"{timing.name} {timing.seconds:.2f}s" for timing in report.timings)
    console.print(f"time: {spent}", markup=False)


_COLUMNS = (
    ("layers", False),
    ("linear", False),
    ("structure", False),
    ("shape", True),
    ("scheme", False),
    ("bits/weight", True),
    ("bytes", True),
    ("error", True),
    ("because", False),
)


def _cells(name: str, rows: Sequence[LayerRow]) -> Sequence[str]:
    first = rows[0]
    errors = [row.error for row in rows if row.error is not None]
    error = "" if not errors else f"{sum(errors) / len(errors):.2e}"
    if len(errors) > 1:
        error += f" (max {max(errors):.2e})"
    shape = f"{first.shape[0]}x{first.shape[1]}" if any(first.shape) else ""
    return (
        spans([row.layer for row in rows if row.layer is not None]),
        name,
        first.structure or "-",
        shape,
        first.scheme or "dense",
        f"{first.bits_per_weight:.2f}",
        human(sum(row.bytes for row in rows)),
        error,
        first.because,
    )


def spans(numbers: Iterable[int]) -> str:
    """`0-3, 5, 7-9`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def human(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
