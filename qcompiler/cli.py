"""The command line. Errors are one message on standard error and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from qcompiler.errors import QCompilerError

if TYPE_CHECKING:
    from qcompiler.ir.graph import Graph

app = typer.Typer(
    name="qcompiler",
    help="Compile a Hugging Face transformer to a mixed-precision compressed-tensors checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder with config.json, or a hub id.")]
PipelineOption = Annotated[str, typer.Option("--pipeline", "-p", help="A packaged pipeline's name, or a YAML file.")]
TargetOption = Annotated[str | None, typer.Option("--target", "-t", help="Runtime and hardware, e.g. vllm-sm90.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Revision of a hub model.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run modeling code that the model brings.")]
PrintAfterOption = Annotated[list[str] | None, typer.Option("--print-after", help="Print the graph after this pass.")]


def main() -> None:
    """Entry point of the `qcompiler` command."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        app()
    except QCompilerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _console() -> Console:
    # Piped output is for programs and files: one row is one line there, however long.
    plain = not sys.stdout.isatty()
    return Console(width=200 if plain else None, highlight=False, soft_wrap=False)


@app.command()
def compile(
    model: Model,
    pipeline: PipelineOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint.")],
    dataset: Annotated[str | None, typer.Option(help="Calibration data: a file, a folder, or a hub id.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 512,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Order in which samples are drawn.")] = 0,
    split: Annotated[str | None, typer.Option(help="Split of the dataset.")] = None,
    config_name: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    packing: Annotated[bool | None, typer.Option("--packing/--no-packing", help="Join rows to full samples.")] = None,
    target: TargetOption = None,
    dtype: DtypeOption = "auto",
    device: Annotated[str, typer.Option(help="Where partitions are run and solved: cpu, cuda.")] = "cpu",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT when the new one is whole.")] = False,
    print_after: PrintAfterOption = None,
) -> None:
    """Compile MODEL to a checkpoint."""
    from qcompiler.compile import compile as run
    from qcompiler.data import CalibrationSpec
    from qcompiler.show import print_report

    spec = CalibrationSpec(
        dataset=dataset,
        config_name=config_name,
        split=split,
        text_column=text_column,
        samples=samples,
        sequence_length=sequence_length,
        packing=packing,
        seed=seed,
    )
    console = _console()
    with _progress() as progress:
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
            show=_printer(print_after, pipeline),
            progress=progress,
        )
    print_report(result.report, console)
    console.print(f"wrote {result.output}", markup=False)


@app.command()
def plan(
    model: Model,
    pipeline: PipelineOption,
    target: TargetOption = None,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    print_after: PrintAfterOption = None,
    print_pipeline: Annotated[bool, typer.Option("--print-pipeline", help="Print the pipeline as YAML.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what compiling MODEL would do. No weight is read."""
    from qcompiler.compile import plan as run
    from qcompiler.pipeline import load_pipeline
    from qcompiler.pipeline import print_pipeline as as_yaml
    from qcompiler.show import print_report

    if print_pipeline:
        print(as_yaml(load_pipeline(pipeline)), end="")
    planned = run(
        model,
        pipeline,
        target=target,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        show=_printer(print_after, pipeline),
    )
    if json:
        from json import dumps

        print(dumps(planned.report.as_dict(), indent=2))
    else:
        print_report(planned.report, _console())


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled checkpoint.")],
    reference: Annotated[str | None, typer.Option(help="The dense model to compare with.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text for KL divergence and perplexity.")] = None,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window of the text.")] = 512,
    sequences: Annotated[int | None, typer.Option(min=1, help="Windows to use; default all.")] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Load OUT as a client would, and compare it with what was compiled and with the dense model."""
    from qcompiler.verify import verify as run

    verification = run(
        checkpoint,
        reference=reference,
        text=text,
        sequence_length=sequence_length,
        sequences=sequences,
        trust_remote_code=trust_remote_code,
    )
    _console().print(str(verification), markup=False)


@app.command()
def passes() -> None:
    """List every pass with its options, and the packaged pipelines."""
    from qcompiler.pipeline.describe import describe_passes, describe_pipelines

    print(describe_passes())
    print(describe_pipelines())


def _printer(names: list[str] | None, pipeline: str) -> Callable[[str, Graph], None] | None:
    if not names:
        return None
    from qcompiler.ir.printer import print_graph
    from qcompiler.pipeline import load_pipeline
    from qcompiler.pipeline.manager import check_print_after

    check_print_after(names, load_pipeline(pipeline))
    return lambda name, graph: print(f"after {name}:\n{print_graph(graph)}") if name in names else None


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar with the time left on a terminal, nothing where output is piped."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("capture", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


if __name__ == "__main__":
    main()
