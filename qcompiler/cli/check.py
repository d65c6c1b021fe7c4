"""`qcompiler check`: its options, and its findings as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from qcompiler.cli.streams import print_json

if TYPE_CHECKING:
    from qcompiler.check import CheckReport, Finding

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def check(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A folder with a compressed-tensors checkpoint, or a hub id.")
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", metavar="NAME", help="Judge it for one runtime and hardware, e.g. vllm-sm90."),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modeling code that the checkpoint brings.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Find what loaders will not load, or load wrong, in any compressed-tensors CHECKPOINT.

    Weights are not read. Exits with 1 where there is an error, and with 2 where the input cannot be checked.
    """
    from qcompiler.check import check_checkpoint

    report = check_checkpoint(checkpoint, target=target, trust_remote_code=trust_remote_code)
    if json:
        print_json(report.as_dict())
    else:
        print(render(report))
    if not report.ok:
        raise typer.Exit(1)


def render(report: CheckReport) -> str:
    """The findings as text, those that differ only in their layer together; then how many there are."""
    lines = []
    for alike in _folded(report.findings):
        first = alike[0]
        loaders = f" [{', '.join(first.loaders)}]" if first.loaders else ""
        lines += [
            f"{first.severity}: {first.code}: {_layers(alike)}{loaders}",
            f"  {first.message}",
            f"  mend: {first.mend}",
        ]
    counts = ", ".join(_counts(report)) or "no findings"
    judged = f"for {report.target}" if report.target else "for vLLM, Transformers and SGLang"
    lines.append(
        f"{report.checkpoint}: {counts}; {report.quantized} of {report.linears} linears are quantized, "
        f"{report.scales} scales were read, judged {judged}"
    )
    return "\n".join(lines)


def _counts(report: CheckReport) -> Iterator[str]:
    for severity, plural in (("error", "errors"), ("warning", "warnings"), ("info", "infos")):
        count = sum(finding.severity == severity for finding in report.findings)
        if count:
            yield f"{count} {severity if count == 1 else plural}"


def _folded(findings: tuple[Finding, ...]) -> list[list[Finding]]:
    """Findings that say the same of several layers (and experts), together."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for finding in findings:
        said = _NUMBER.sub("*", finding.message.replace(finding.layer, "*"))
        groups.setdefault((finding.severity, finding.code, finding.loaders, said), []).append(finding)
    return list(groups.values())


def _layers(alike: list[Finding]) -> str:
    """Places with how many layers have them: `model.layers.*.mlp.down_proj (32)`."""
    places: dict[str, list[str]] = {}
    for finding in alike:
        places.setdefault(_NUMBER.sub("*", finding.layer), []).append(finding.layer)
    return ", ".join(f"{place} ({len(names)})" if len(names) > 1 else names[0] for place, names in places.items())
