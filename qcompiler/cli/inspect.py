"""The command `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompiler.cli.options import DtypeOption, IndependentOption, RevisionOption, TargetOption, TrustOption
from qcompiler.cli.streams import PIPED_WIDTH, print_json_text, print_lines, terminal_width
from qcompiler.collector import imports_kept

if TYPE_CHECKING:
    from qcompiler.inspection.document import Document
    from qcompiler.inspection.read import Options


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A model's folder or hub id, a quantized checkpoint, or an export (JSON)."
        ),
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option("--pipeline", "-p", metavar="NAME", help="What to do to MODEL before it is shown.")
    ] = None,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="PASS", help="Stop after this pass, or after `capture`; default: where weights are needed."
        ),
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Show modules as a tree.")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="NAME", help="Say why this module, node or group is what it is.")
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B",
            help="Compare two passes of the pipeline; without --pipeline two pipelines, or two folders or exports.",
        ),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the graph to a .json, .graphml or .dot file.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one self-contained page for a browser.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE where there is one.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Show every node; in a tree, every layer.")] = False,
    target: TargetOption = None,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    independent: IndependentOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Look at MODEL as the compiler sees it: as captured, after a pass, or compiled.

    Layers that are alike are shown once. No weight is read.
    """
    _check_together(
        tree=tree, explain=explain is not None, diff=diff is not None, export=export is not None, html=html is not None
    )
    _check_useless(full, explain is not None or diff is not None, after, pipeline, diff is not None, json, tree)
    if (full or json) and (export or html):
        raise typer.BadParameter("it is for what is printed, not for files", param_hint="--full" if full else "--json")
    if overwrite and not (export or html):
        raise typer.BadParameter("it is for the file of --export or --html", param_hint="--overwrite")
    if independent and pipeline is None and diff is None:
        raise typer.BadParameter("it needs --pipeline", param_hint="--independent")

    with imports_kept():
        from qcompiler.inspection import export as files
        from qcompiler.inspection.read import Options

    options = Options(target, dtype, revision, trust_remote_code, independent)
    if diff is not None:
        _diff(model, pipeline, diff, options, json)
        return
    if model is None:
        raise typer.BadParameter("it is missing: only --diff of two folders needs none", param_hint="MODEL")
    if export is not None:
        files.writer_of(export)
    if (file := export or html) is not None:  # before the model is read
        files.check_place(file, overwrite=overwrite)

    from qcompiler.inspection.read import read

    document = read(model, pipeline, after=after, options=options)
    if export is not None:
        files.export(document, export)
        print(f"wrote {export}: {len(document.nodes)} nodes")
        return
    if html is not None:
        from qcompiler.inspection.page import write_page

        write_page(document, html)
        print(f"wrote {html}: {len(document.nodes)} nodes")
        return
    if json:
        print_json_text(_one(document, explain) if explain is not None else document.as_json())
        return

    from qcompiler.inspection.explain import explain_lines
    from qcompiler.inspection.text import full_lines, text_lines
    from qcompiler.inspection.tree import tree_lines

    width = terminal_width() or PIPED_WIDTH
    if explain is not None:
        lines = explain_lines(document, explain, width)
    elif tree:
        lines = tree_lines(document, width, full=full)
    else:
        lines = full_lines(document) if full else text_lines(document, width)
    print_lines(lines)


def _one(document: Document, name: str) -> str:
    """A node, or a list of the groups of one id, as JSON."""
    from pydantic_core import to_json

    return to_json(document.groups_of(name) or document.find(name), indent=2).decode()


def _diff(model: str | None, pipeline: str | None, words: tuple[str, str], options: Options, json: bool) -> None:
    from qcompiler.inspection.diff import compare, diff_lines
    from qcompiler.inspection.pairs import read_pair

    found = compare(*read_pair(model, pipeline, words, options), words)
    if json:
        print_json_text(found.model_dump_json(indent=2))
    else:
        print_lines(diff_lines(found, terminal_width() or PIPED_WIDTH))


def _check_together(**given: bool) -> None:
    chosen = [f"--{name}" for name, there in given.items() if there]
    if len(chosen) > 1:
        raise typer.BadParameter(f"it cannot be combined with {chosen[1]}", param_hint=chosen[0])


def _check_useless(
    full: bool, one: bool, after: str | None, pipeline: str | None, diff: bool, json: bool, tree: bool
) -> None:
    """Refuse options that would do nothing."""
    if full and (one or json):
        raise typer.BadParameter("it is for the graph as text or tree", param_hint="--full")
    if json and tree:
        raise typer.BadParameter("it cannot be combined with --tree", param_hint="--json")
    if after is not None and diff:
        raise typer.BadParameter("--diff says itself after which passes", param_hint="--after")
    if after is not None and pipeline is None:
        raise typer.BadParameter("it needs --pipeline", param_hint="--after")
