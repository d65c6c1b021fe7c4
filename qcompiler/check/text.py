"""What a check found, as people read it: what differs only in its layer is told once, and the last line sums up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.text import Text

from qcompiler.check.findings import CheckReport, Finding, Severity
from qcompiler.errors import printable

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
_COUNT = re.compile(r"(?<![\w/.])\d+(?![\w/])")  # not the numbers of `w:int4/g128`
_BLOCKS = 20  # of one code that are printed; the others are counted
_PLACES = 8  # that are named; the others are counted
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "cyan"}
_PLURALS = {Severity.ERROR: "errors", Severity.WARNING: "warnings", Severity.INFO: "infos"}


def report_lines(report: CheckReport, width: int | None = None) -> list[Text]:
    """The findings, alike ones together; then a line that sums up. width: to wrap at, in columns; None: do not."""
    lines: list[Text] = []
    told: dict[str, list[Finding]] = {}
    for alike in _folded(report.findings):
        first = alike[0]
        blocks = told.setdefault(first.code, [])
        blocks.append(first)
        if len(blocks) <= _BLOCKS:
            lines += _block(alike, width)
    for code, blocks in told.items():
        if len(blocks) > _BLOCKS:
            text = f"{blocks[0].severity}: {code}: {len(blocks) - _BLOCKS} more kinds of it; `--json` has them all"
            lines += _wrapped(Text(text), width, hang=2)
    return [*lines, *_wrapped(_summary(report), width, hang=2)]


def _block(alike: Sequence[Finding], width: int | None) -> Iterator[Text]:
    first = alike[0]
    loaders = f" [{', '.join(first.loaders)}]" if first.loaders else ""
    head = Text.assemble((str(first.severity), _STYLES[first.severity]), f": {first.code}: {_places(alike)}{loaders}")
    yield from _wrapped(head, width, hang=4)
    same = len({_INDEX.sub("*", f.message.replace(f.layer, "*")) for f in alike}) == 1
    others = "" if same else f" (so {first.layer}; other numbers elsewhere)"
    yield from _wrapped(Text(f"  {printable(first.message)}{printable(others)}"), width, hang=4)
    yield from _wrapped(Text.assemble("  ", ("mend:", "bold"), f" {printable(first.mend)}"), width, hang=4)


def _folded(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Findings that say the same of several layers (and experts), together, whatever they count in each."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in findings:
        said = _COUNT.sub("#", _INDEX.sub("*", finding.message.replace(finding.layer, "*")))
        groups.setdefault((finding.severity, finding.code, finding.loaders, said), []).append(finding)
    return list(groups.values())


def _places(alike: Sequence[Finding]) -> str:
    """Places with how many layers have them: `model.layers.*.mlp.{gate_proj,up_proj} (64)`."""
    by_parent: dict[str, dict[str, list[str]]] = {}
    for finding in alike:
        parent, _, leaf = _INDEX.sub("*", finding.layer).rpartition(".")
        by_parent.setdefault(parent, {}).setdefault(leaf, []).append(finding.layer)
    named = []
    for parent, leaves in by_parent.items():
        layers = [layer for members in leaves.values() for layer in members]
        place = f"{parent}." if parent else ""
        place += f"{{{','.join(leaves)}}}" if len(leaves) > 1 else next(iter(leaves))
        named.append(f"{place} ({len(layers)})" if len(layers) > 1 else layers[0])
    more = f" and {len(named) - _PLACES} more" if len(named) > _PLACES else ""
    return printable(", ".join(named[:_PLACES]) + more)


def _summary(report: CheckReport) -> Text:
    counts: list[str | tuple[str, str]] = []
    for severity, plural in _PLURALS.items():
        count = len(report.of(severity))
        if count:
            told = (f"{count} {severity if count == 1 else plural}", _STYLES[severity])
            counts += [", ", told] if counts else [told]
    judged = f"for {report.target}" if report.target else "for vLLM, Transformers and SGLang"
    return Text.assemble(
        (printable(str(report.checkpoint)), "bold"),
        ": ",
        *(counts or [("no findings", "green")]),
        f"; {report.quantized} of {report.linears} linears are quantized, {report.scales} scales were read, judged "
        f"{judged}",
    )


def _wrapped(line: Text, width: int | None, hang: int) -> Iterator[Text]:
    """A line cut at spaces to a width, its further lines indented. A name that is longer stays whole."""
    if width is None or line.cell_len <= width:
        yield line
        return
    start = indent = 0
    while line.cell_len - start > width - indent:
        room = start + width - indent
        first = start + len(line.plain[start:]) - len(line.plain[start:].lstrip())
        cut = line.plain.rfind(" ", first, room + 1)
        if cut <= start:
            cut = line.plain.find(" ", room)
        if cut < 0:
            break
        yield Text(" " * indent) + line[start:cut]
        start, indent = cut + 1, hang
    yield Text(" " * indent) + line[start:]
