"""Arguments and options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder with config.json, or a hub id.")]
PipelineOption = Annotated[
    str,
    typer.Option("--pipeline", "-p", metavar="NAME", help="A packaged pipeline's name, a YAML file, or a recipe."),
]
TargetOption = Annotated[
    str | None, typer.Option("--target", "-t", metavar="NAME", help="Runtime and hardware, e.g. vllm-sm90.")
]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="NAME", help="auto, bfloat16, float16 or float32.")]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit of a hub model.")
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run modeling code that the model brings.")]
PrintPipelineOption = Annotated[bool, typer.Option("--print-pipeline", help="First print the pipeline as YAML.")]
ConfigNameOption = Annotated[str | None, typer.Option(metavar="NAME", help="Configuration of a hub dataset.")]
TextColumnOption = Annotated[str | None, typer.Option(metavar="NAME", help="Column that holds the text, or the chat.")]
IndependentOption = Annotated[
    bool, typer.Option("--independent", help="Give each algorithm that the rules name a run of its own over the data.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
PrintAfterOption = Annotated[
    list[str] | None,
    typer.Option("--print-after", metavar="PASS", help="Print the graph after this pass. May be repeated."),
]
LeavesOption = Annotated[
    bool, typer.Option("--leaves", help="Of that graph, print layers and inserted operations alone.")
]
