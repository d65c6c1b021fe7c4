"""The two packages point one way, small parts stay light, and the API's names stay the API's."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest

import qcompiler

ROOT = Path(qcompiler.__file__).parent.parent


def imports(source: str) -> Iterator[str]:
    """Every module that some code names in an import, wherever it stands: in functions, under conditions, by call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and node.args and _called(node) in ("import_module", "__import__", "files"):
            yield from (
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            )


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def package(name: str) -> str:
    return name.partition(".")[0]


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("file", files("qcompiler"), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_mechanism_never_imports_the_policy(file: Path) -> None:
    named = list(imports(file.read_text(encoding="utf-8")))
    assert not [name for name in named if package(name) in ("passes", "tools", "tests")]
    assert not [name for name in named if name.startswith(".")], "relative imports hide where they lead"


LAYERS = (
    {"collector", "errors", "report"},
    {"limits"},
    {"arguments", "options", "scheme", "expressions", "refuse", "requirements", "meta", "tensors"},
    {"numerics"},
    {"formats", "solvers", "transforms.norms", "transforms.options"},
    {"ir"},
    {"patterns", "select", "transforms"},
    {"emit", "targets"},
    {"checkpoints", "data"},
    {"source", "fidelity", "provenance"},
    {"pipeline", "runtime"},
    {"capture"},
    {"lowering"},
    {"calibration", "check", "compiler", "verification", "table_check", "show", "demo"},
    {"inspection"},
    {"cli", "__init__"},
)
"""The modules and packages of the mechanism, from the ground up: each imports what stands beside or below it.

A module that stands apart from its package has an entry of its own.
"""


DEPTH = {name: index for index, layer in enumerate(LAYERS) for name in layer}


def depth(module: str) -> int:
    """The layer of a module by its dotted name: its own where it has one, else its package's."""
    own = module.removeprefix("qcompiler.")
    return DEPTH[own if own in DEPTH else own.partition(".")[0]]


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def test_imports_lead_down() -> None:
    for file in files("qcompiler"):
        named = [name for name in imports(file.read_text(encoding="utf-8")) if name.startswith("qcompiler.")]
        assert not [name for name in named if depth(name) > depth(module_of(file))], file


def test_every_layer_names_what_there_is() -> None:
    assert DEPTH.keys() <= {name.removeprefix("qcompiler.") for name in map(module_of, files("qcompiler"))} | {
        file.parent.name for file in files("qcompiler")
    }


LAZY = {
    "qcompiler/__init__.py",
    "qcompiler/cli/__init__.py",
    "qcompiler/cli/check.py",
    "qcompiler/cli/commands.py",
    "qcompiler/cli/inspect.py",
    "qcompiler/cli/streams.py",
    "qcompiler/pipeline/registry.py",
}
"""What must answer at once, and so imports heavy parts when it needs them."""


def test_only_what_must_answer_at_once_imports_inside_functions() -> None:
    for file in files("qcompiler"):
        tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        functions = [node for node in tree if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inner = [name for node in functions for name in imports(ast.unparse(node)) if package(name) == "qcompiler"]
        assert not inner or str(file.relative_to(ROOT)) in LAZY, file


def test_imports_are_found_wherever_they_hide() -> None:
    source = """
import a.b, c
from d import e
from . import f
def g():
    if True:
        from h.i import j
    importlib.import_module("k.l")
    __import__("m")
class n:
    import o as p
"""
    assert set(imports(source)) == {"a.b", "c", "d", ".", "h.i", "k.l", "m", "o"}


@pytest.mark.parametrize("file", files("passes"), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_pass_imports_no_other_pass(file: Path) -> None:
    named = imports(file.read_text(encoding="utf-8"))
    # What reads recipes is no pass, but a package of its own: it writes names of passes, and imports none.
    if file.parent.name == "recipes":
        named = (name for name in named if not name.startswith("passes.recipes."))
    assert not [name for name in named if package(name) in ("passes", "tools", "tests")]


def loaded_by(code: str) -> set[str]:
    """The packages that are loaded once some code has run in a process of its own."""
    code = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"torch", "transformers", "datasets", "compressed_tensors", "safetensors"}


@pytest.mark.parametrize(
    "code",
    [
        "import qcompiler",
        "import qcompiler, qcompiler.cli, qcompiler.errors; dir(qcompiler)",
        "import sys, qcompiler.cli as cli\nsys.argv = ['qcompiler', '--version']\n"
        "try:\n    cli.main()\nexcept SystemExit as e:\n    assert not e.code",
        "import sys, qcompiler.cli as cli\nsys.argv = ['qcompiler', 'compile', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as e:\n    assert not e.code",
    ],
    ids=["package", "command line", "version", "help"],
)
def test_what_answers_at_once_loads_nothing_heavy(code: str) -> None:
    loaded = loaded_by(code)
    assert "qcompiler" in loaded
    assert loaded & (HEAVY | {"passes"}) == set()


def test_datasets_is_loaded_only_where_one_is_named(tmp_path: Path) -> None:
    code = (
        "import qcompiler.compiler, qcompiler.verification, qcompiler.data.sources as sources\n"
        "def rows(**said):\n"
        "    with sources.open_source(**said, config_name=None, split=None, usual_split='train') as source:\n"
        "        return list(source.rows)\n"
        "assert rows(dataset=None, rows=['a', 'b']) == ['a', 'b']\n"
    )
    assert "datasets" not in loaded_by(code)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n', encoding="utf-8")
    assert "datasets" in loaded_by(f"{code}assert rows(dataset={str(file)!r}, rows=None) == [{{'text': 'a'}}]\n")


def test_every_name_of_the_api_is_there() -> None:
    for name in qcompiler.__all__:
        assert getattr(qcompiler, name) is not None
    assert set(qcompiler.__all__) == set(qcompiler._HOME)
    with pytest.raises(AttributeError, match="module 'qcompiler' has no attribute 'compil'"):
        _ = qcompiler.compil  # type: ignore[attr-defined]


def test_no_module_takes_the_place_of_a_function_of_the_api() -> None:
    # Importing `qcompiler.x` sets the attribute `x` of the package: a module `compile` would hide the function.
    modules = {module.name for module in pkgutil.walk_packages(qcompiler.__path__, "qcompiler.")}
    assert not {f"qcompiler.{name}" for name in qcompiler.__all__} & modules
    for name in modules:
        importlib.import_module(name)
    functions = ("check_checkpoint", "compile", "plan", "verify", "load_pipeline")
    assert all(isinstance(getattr(qcompiler, name), FunctionType) for name in functions)
    assert qcompiler.load_pipeline("int4-int8").name == "int4-int8"
    assert all(isinstance(getattr(qcompiler, name), FunctionType) for name in functions)
    assert all(isinstance(getattr(qcompiler, name), type) for name in set(qcompiler.__all__) - set(functions))


@pytest.mark.parametrize("folder", ["qcompiler", "passes", "tests", "tools"])
def test_no_module_is_too_long_to_read(folder: str) -> None:
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in files(folder)}
    assert {name: count for name, count in lines.items() if count > 400} == {}, "split it by subject"
