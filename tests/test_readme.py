"""The README's generated parts are what the code says now; `--update-golden` rewrites them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import qcompiler
from qcompiler.check import KINDS
from qcompiler.demo import calibration_text, model_path
from qcompiler.inspection.document import Document
from qcompiler.inspection.explain import explain_lines
from qcompiler.inspection.read import read_plan
from qcompiler.inspection.text import text_lines
from qcompiler.ir.annotations import Leaf, Role, get
from qcompiler.ir.graph import Graph
from qcompiler.ir.ops import OPS
from qcompiler.ir.printer import Printer
from qcompiler.pipeline import load_pipeline, parse_pipeline, print_pipeline
from qcompiler.pipeline.describe import describe_passes, describe_pipelines
from qcompiler.pipeline.registry import pass_names
from qcompiler.scheme import PRESETS
from qcompiler.targets import load_target, target_names

README = Path(__file__).parent.parent / "README.md"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.rstrip("\n").splitlines())


def _first_layer(graph: Graph) -> str:
    chosen, inserted = [], set(OPS.values())
    for node in graph.nodes:
        role = get(node, Role) or next((r for user in node.users if (r := get(user, Role))), None)
        if role is not None and role.layer == 0 and (get(node, Leaf) or node.target in inserted):
            chosen.append(node)
    return Printer(graph).lines(chosen)


def captured() -> str:
    from qcompiler.capture import capture_graph
    from qcompiler.source import open_model

    with open_model(model_path()) as source:
        return _indented(_first_layer(capture_graph(source.model)))


def lowered() -> str:
    from qcompiler.lowering.rewrite import lower_graph

    graph = qcompiler.plan(model_path(), "w8a8+w4a16").graph
    lower_graph(graph)
    return _indented(_first_layer(graph))


def presets() -> str:
    rows = [f"| `{name}` | `{scheme.short}` | {scheme.format} |" for name, scheme in PRESETS.items()]
    return "\n".join(["| preset | scheme | format |", "|---|---|---|", *rows])


def targets() -> str:
    rows = [f"| `{name}` | {load_target(name).runtime} | {load_target(name).hardware} |" for name in target_names()]
    return "\n".join(["| target | runtime | hardware |", "|---|---|---|", *rows])


def findings() -> str:
    rows = [f"| `{code}` | {kind.severity} | {kind.says} |" for code, kind in KINDS.items()]
    return "\n".join(["| finding | severity | says |", "|---|---|---|", *rows])


def passes() -> str:
    project = tomllib.loads((README.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["entry-points"]["qcompiler.passes"]
    assert set(declared) <= set(pass_names()), (
        "the entry points that are installed are older than pyproject.toml: copy them into entry_points.txt of "
        "qcompiler.egg-info in this folder, or install again"
    )
    return _indented(describe_passes() + "\n" + describe_pipelines())


_TWO_RULES = """
name: two-rules
passes:
- assign:
    rules:
    - {select: {structure: [attention-input, attention-output, mlp-input]}, scheme: W4A16}
    - {select: {structure: mlp-output}, scheme: W8A16}
    - {select: {structure: mlp-output, layers: -1}, scheme: W4A16, override: true}
    ignore: [{structure: lm-head}]
- legalize
"""


@cache
def _inspected() -> Document:
    document = read_plan(model_path(), parse_pipeline(_TWO_RULES))
    return document.model_copy(update={"model": document.model.model_copy(update={"name": "MODEL"})})


def inspected() -> str:
    return _indented("\n".join(line.plain for line in text_lines(_inspected(), 116)))


def explained() -> str:
    lines = explain_lines(_inspected(), "model.layers.3.mlp.down_proj", 116)
    return _indented("\n".join(line.plain for line in lines))


SECTIONS: dict[str, Callable[[], str]] = {
    "captured": captured,
    "lowered": lowered,
    "inspect": inspected,
    "explain": explained,
    "int4-int8": lambda: _indented(print_pipeline(load_pipeline("int4-int8"))),
    "presets": presets,
    "passes": passes,
    "targets": targets,
    "findings": findings,
}


@cache
def marked() -> dict[str, str]:
    text = README.read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- generated: (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL))


def test_every_marked_part_has_a_generator() -> None:
    assert marked().keys() == SECTIONS.keys()


@pytest.mark.parametrize("name", SECTIONS)
def test_generated_parts_are_current(name: str, request: pytest.FixtureRequest) -> None:
    part = f"\n{SECTIONS[name]()}\n\n"
    if request.config.getoption("--update-golden"):
        text = README.read_text(encoding="utf-8")
        start, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        README.write_text(before + start + part + end + rest.partition(end)[2], encoding="utf-8")
        marked.cache_clear()
    assert marked()[name] == part, "run pytest --update-golden tests/test_readme.py"


def test_commands_of_the_readme_exist() -> None:
    """Every `qcompiler` line is one that the command line parses; every file and make target is there."""
    from typer.main import get_command

    from qcompiler.cli.commands import app

    text = README.read_text(encoding="utf-8")
    commands = re.findall(r"^    qcompiler (.+?)(?:  +#.*)?$", text, re.MULTILINE)
    assert commands
    group = get_command(app)
    for line in commands:
        name, *arguments = line.split()
        command = group.commands[name]  # type: ignore[attr-defined]
        command.make_context(name, list(arguments))
    root = README.parent
    for file in re.findall(r"python (tools/\S+\.py)|\]\(((?:passes|tools)/\S+)\)|`(qcompiler/\w+(?:/\w+)?)`", text):
        assert (root / next(filter(None, file))).exists()
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    code = code.replace("MODEL", str(model_path())).replace("DATA", str(calibration_text()))
    exec(compile(code.replace("samples=128", "samples=4"), "README.md", "exec"), {})
    assert (tmp_path / "OUT" / "config.json").exists()
