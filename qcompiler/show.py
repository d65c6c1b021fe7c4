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
        groups.setdefault((name, row.scheme, _by(row), row.structure, row.shape, row.because), []).append(row)
    return [(str(key[0]), members) for key, members in groups.items()]


def print_report(report: Report, console: Console) -> None:
    """The report: a line per kind of layer, totals, notes, times."""
    table = Table(title=f"{report.model}: {report.pipeline} for {report.target}", title_justify="left", box=None)
    lines = [_cells(name, rows) for name, rows in folded(report.layers)]
    used = [place for place in range(len(_COLUMNS)) if any(line[place] for line in lines)]
    for column, right in (_COLUMNS[place] for place in used):
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for line in lines:
        table.add_row(*(line[place] for place in used))
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
    ("by", False),
    ("bits/weight", True),
    ("bytes", True),
    ("error", True),
    ("output error", True),
    ("of nearest", True),
    ("seconds", True),
    ("because", False),
)


def _cells(name: str, rows: Sequence[LayerRow]) -> Sequence[str]:
    first = rows[0]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    shape = f"{first.shape[0]}x{first.shape[1]}" if any(first.shape) else ""
    return (
        spans([row.layer for row in rows if row.layer is not None]),
        name,
        first.structure or "-",
        shape,
        first.scheme or "dense",
        _by(first),
        f"{first.bits_per_weight:.2f}",
        human(sum(row.bytes for row in rows)),
        _errors([row.error for row in rows]),
        _errors([row.output_error for row in rows]),
        _against_nearest(rows),
        f"{sum(seconds):.2f}" if seconds else "",
        first.because,
    )


def _by(row: LayerRow) -> str:
    """Transform and solver."""
    return "+".join(name for name in (row.transform, row.solver) if name and not (row.transform and name == "rtn"))


def _errors(found: Sequence[float | None]) -> str:
    """The mean of what is known, and the largest."""
    errors = [error for error in found if error is not None]
    mean = f"{sum(errors) / len(errors):.2e}" if errors else ""
    return f"{mean} (max {max(errors):.2e})" if len(errors) > 1 else mean


def _against_nearest(rows: Sequence[LayerRow]) -> str:
    """The output error as a share of that of rounding to nearest, and of AWQ's scale as a share of none."""
    solved = [(row.output_error, row.nearest_output_error) for row in rows]
    pairs = [(error, nearest) for error, nearest in solved if error is not None and nearest]
    gains = [row.transform_gain for row in rows if row.transform_gain is not None]
    if pairs:
        return f"{sum(error for error, _ in pairs) / sum(nearest for _, nearest in pairs):.0%}"
    return f"{sum(gains) / len(gains):.0%}" if gains else ""


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
