"""The command `check`."""

from __future__ import annotations

from typing import Annotated

import typer

from qcompiler.cli.options import RevisionOption, TargetOption, TrustOption
from qcompiler.cli.streams import print_json, print_lines, terminal_width
from qcompiler.collector import imports_kept


def check(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A folder with a compressed-tensors checkpoint, or a hub id.")
    ],
    target: TargetOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Find what loaders will not load, or load wrong, in any compressed-tensors CHECKPOINT.

    Weights are not read. Exits with 0 where there is no error, 1 where there is one, and 2 where the input cannot be
    checked. --target makes warnings of errors that concern other runtimes alone.
    """
    with imports_kept():
        from qcompiler.check import check_checkpoint

    report = check_checkpoint(checkpoint, target=target, revision=revision, trust_remote_code=trust_remote_code)
    if json:
        print_json(report.as_dict())
    else:
        from qcompiler.check.text import report_lines

        print_lines(report_lines(report, terminal_width()))
    if not report.ok:
        raise typer.Exit(1)
