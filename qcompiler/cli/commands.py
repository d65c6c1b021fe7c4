"""The commands and their options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompiler.cli.check import check
from qcompiler.cli.inspect import inspect
from qcompiler.cli.options import (
    ConfigNameOption,
    DtypeOption,
    IndependentOption,
    JsonOption,
    LeavesOption,
    Model,
    PipelineOption,
    PrintAfterOption,
    PrintPipelineOption,
    RevisionOption,
    TargetOption,
    TextColumnOption,
    TrustOption,
)
from qcompiler.cli.streams import (
    print_error,
    print_json,
    print_result,
    progress_bar,
    quiet_libraries,
    standard_error,
    standard_output,
)
from qcompiler.collector import imports_kept
from qcompiler.errors import OutputError, QCompilerError
from qcompiler.requirements import check_transformers

if TYPE_CHECKING:
    from qcompiler.ir.graph import Graph

app = typer.Typer(
    name="qcompiler",
    help="Compile a Hugging Face transformer to a mixed-precision compressed-tensors checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

READER_GONE = 141
"""What shells call a process that SIGPIPE ended."""

_DATA_OPTIONS = (
    "config_name",
    "split",
    "text_column",
    "samples",
    "sequence_length",
    "packing",
    "shuffle",
    "seed",
    "batch_tokens",
)
_TEXT_OPTIONS = ("config_name", "split", "text_column", "sequence_length", "sequences")


def run() -> None:
    """Run the command that `sys.argv` holds.

    Exits with 2 where the input is bad or nothing can be printed, 141 where the reader of what is printed went away.
    """
    with quiet_libraries(), standard_error():
        try:
            with standard_output():
                check_transformers()
                app(prog_name="qcompiler")
        except OutputError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                sys.exit(READER_GONE)
            print_error(error)
            sys.exit(2)
        except QCompilerError as error:
            print_error(error)
            sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"qcompiler {version('qcompiler')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    # Typer shows the help of the application itself; this function only holds its options.
    return None


@app.command()
def compile(
    context: typer.Context,
    model: Model,
    pipeline: PipelineOption,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of the checkpoint.")],
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="Calibration data: a file, a folder, or a hub id. Not all pipelines need it."
        ),
    ] = None,
    config_name: ConfigNameOption = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Split of the dataset; default: train.")] = None,
    text_column: TextColumnOption = None,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Calibration samples.")] = 512,
    sequence_length: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens per sample; capped at the model's window.")
    ] = 2048,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Join rows to full samples; default: only text files.")
    ] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="Draw rows in random order.")] = True,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="What that order is drawn from.")] = 0,
    batch_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Tokens run at once, at most; default: 1024 on a CPU, else 16384."),
    ] = None,
    target: TargetOption = None,
    dtype: DtypeOption = "auto",
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Where partitions are run and solved: cpu, cuda, cuda:1.")
    ] = "cpu",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when the new one is whole.")] = False,
    independent: IndependentOption = False,
    print_after: PrintAfterOption = None,
    leaves: LeavesOption = False,
    print_pipeline: PrintPipelineOption = False,
    json: JsonOption = False,
) -> None:
    """Compile MODEL to a checkpoint."""
    _check_prints(json, print_after, print_pipeline, leaves)
    if dataset is None:
        _refuse_without("--dataset", context, _DATA_OPTIONS)

    with imports_kept():
        from qcompiler.compiler import compile as run
        from qcompiler.data import CalibrationSpec

    spec = CalibrationSpec(
        dataset=dataset,
        config_name=config_name,
        split=split,
        text_column=text_column,
        samples=samples,
        sequence_length=sequence_length,
        packing=packing,
        shuffle=shuffle,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    if print_pipeline:
        _print_yaml(pipeline, independent)
    with progress_bar(downloads=not Path(model).is_dir()) as progress:
        result = run(
            model,
            pipeline=pipeline,
            output=output,
            calibration=spec if dataset is not None else None,
            target=target,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            independent=independent,
            show=_printer(print_after, pipeline, leaves),
            progress=progress,
        )
    if json:
        print_json(result.report.as_dict())
    else:
        print_result(result.report)
        print(f"wrote {result.output}")


@app.command()
def plan(
    model: Model,
    pipeline: PipelineOption,
    target: TargetOption = None,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    independent: IndependentOption = False,
    print_after: PrintAfterOption = None,
    leaves: LeavesOption = False,
    print_pipeline: PrintPipelineOption = False,
    json: JsonOption = False,
) -> None:
    """Say what compiling MODEL would do.

    Nothing is calibrated and no weight is read.
    """
    _check_prints(json, print_after, print_pipeline, leaves)

    with imports_kept():
        from qcompiler.compiler import plan as run

    if print_pipeline:
        _print_yaml(pipeline, independent)
    planned = run(
        model,
        pipeline,
        target=target,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        independent=independent,
        show=_printer(print_after, pipeline, leaves, planning=True),
    )
    if json:
        print_json(planned.report.as_dict())
    else:
        print_result(planned.report)


@app.command()
def verify(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled checkpoint.")],
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model that OUT was compiled from.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Text for perplexity and KL divergence: a file, a folder, or a hub id."),
    ] = None,
    config_name: ConfigNameOption = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Split of the dataset; default: test.")] = None,
    text_column: TextColumnOption = None,
    sequence_length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens per window of the text.")] = 512,
    sequences: Annotated[int | None, typer.Option(metavar="N", min=1, help="Windows to use; default: all.")] = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Check that OUT is what was compiled, and load it as a client would.

    Its files must be those that were written, and its logits those of the graph that was compiled. --reference compares
    weights with the dense model's, and with --text what the two predict.
    """
    if text is None:
        _refuse_without("--text", context, _TEXT_OPTIONS)

    from dataclasses import asdict

    with imports_kept():
        from qcompiler.verification import verify as run

    verification = run(
        out,
        reference=reference,
        text=text,
        config_name=config_name,
        split=split,
        text_column=text_column,
        sequence_length=sequence_length,
        sequences=sequences,
        trust_remote_code=trust_remote_code,
    )
    if json:
        print_json(asdict(verification))
    else:
        print(verification)


app.command()(check)
app.command()(inspect)


@app.command()
def passes() -> None:
    """List passes with their options, and packaged pipelines."""
    from qcompiler.pipeline.describe import describe_passes, describe_pipelines

    print(describe_passes())
    print(describe_pipelines(), end="")


def _check_prints(json: bool, print_after: list[str] | None, print_pipeline: bool, leaves: bool) -> None:
    if leaves and not print_after:
        raise typer.BadParameter("it needs --print-after", param_hint="--leaves")
    if json and (print_after or print_pipeline):
        raise typer.BadParameter("it cannot be combined with --print-after or --print-pipeline", param_hint="--json")


def _refuse_without(needed: str, context: typer.Context, names: Collection[str]) -> None:
    """Refuse options that do nothing where the option `needed` is not given."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source is not None and source.name == "COMMANDLINE":
            negated = option.secondary_opts and not context.params[option.name]
            written = (option.secondary_opts if negated else option.opts)[0]
            raise typer.BadParameter(f"it needs {needed}", param_hint=written)


def _print_yaml(pipeline: str, independent: bool) -> None:
    from qcompiler.pipeline import load_pipeline, print_pipeline
    from qcompiler.pipeline.independent import independent_runs

    chosen = load_pipeline(pipeline)
    print(print_pipeline(independent_runs(chosen) if independent else chosen))


def _printer(
    names: list[str] | None, pipeline: str, leaves: bool, *, planning: bool = False
) -> Callable[[str, Graph], None] | None:
    if not names:
        return None
    from qcompiler.ir.printer import print_graph, print_leaves
    from qcompiler.pipeline import load_pipeline
    from qcompiler.pipeline.manager import check_print_after

    check_print_after(names, load_pipeline(pipeline), planning=planning)
    text = print_leaves if leaves else print_graph
    return lambda name, graph: print(f"after {name}:\n{text(graph)}") if name in names else None
