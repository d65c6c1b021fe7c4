"""`qcompiler inspect`: what it prints and writes, and what it says of what it cannot read."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler import cli
from qcompiler.inspection.read import read_plan
from tests.cli.command import write
from tests.cli.conftest import Refuse, Run


@pytest.fixture(scope="module")
def graph(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a planned model: read back in no time."""
    file = tmp_path_factory.mktemp("exports") / "graph.json"
    return write(file, read_plan(model, "w8a8-rtn").as_json())


def test_a_model_is_shown_after_a_pass(run: Run, model: Path) -> None:
    ran = run("inspect", model, "--pipeline", "w8a8-rtn", "--after", "assign")
    assert ran.code == 0, ran
    assert "w8a8-rtn after assign (annotated)" in ran.out
    assert re.search(r"^  self_attn\.q_proj .* w:int8/channel a:int8/token +rtn", ran.out, re.MULTILINE)


def test_passes_are_compared_in_one_run(run: Run, model: Path) -> None:
    ran = run("inspect", model, "--pipeline", "w8a8-rtn", "--diff", "capture", "assign")
    assert ran.code == 0, ran
    assert ran.out.startswith("capture → assign\n")
    assert re.search(r"mlp\.down_proj +scheme +dense +w:int8/channel a:int8/token", ran.out)


def test_pipelines_are_compared(run: Run, model: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.yaml", "passes: [{assign: {rules: [{select: {name: lm_head}, scheme: W8A8}]}}]")
    ran = run("inspect", model, "--diff", "w8a8-rtn", other)
    assert ran.code == 0, ran
    assert re.search(r"lm_head +scheme +dense +w:int8/channel a:int8/token", ran.out)


def test_checkpoints_and_exports_are_compared_without_a_model(run: Run, compiled: Path, graph: Path) -> None:
    ran = run("inspect", "--diff", graph, compiled, "--json")
    assert ran.code == 0, ran
    found = json.loads(ran.out)
    assert {change["what"] for change in found["facts"]} == {"stage"}
    assert all({change["what"] for change in layer["changes"]} == {"error"} for layer in found["layers"])
    assert len(found["layers"]) == 7


def test_a_checkpoint_is_explained_with_its_error(run: Run, compiled: Path) -> None:
    ran = run("inspect", compiled, "--explain", "model.layers.0.mlp.up_proj")
    assert ran.code == 0, ran
    assert re.search(r"^  error +\d\.\d{3}e-\d\d of the weight's square$", ran.out, re.MULTILINE)
    assert "assign: rule 1" in ran.out


def test_exports_are_read_back_and_shown_alike(run: Run, graph: Path, tmp_path: Path) -> None:
    for name in ("again.json", "again.graphml", "again.dot"):
        ran = run("inspect", graph, "--export", tmp_path / name)
        assert ran.out.startswith(f"wrote {tmp_path / name}: "), ran
    assert (tmp_path / "again.json").read_bytes() == graph.read_bytes()
    assert run("inspect", tmp_path / "again.json").out == run("inspect", graph).out
    assert json.loads(run("inspect", graph, "--json").out) == json.loads(graph.read_text())


@pytest.mark.parametrize("option", ["--export", "--html"])
def test_a_file_that_is_there_is_replaced_only_when_asked(
    option: str, run: Run, refuse: Refuse, graph: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / ("mine.json" if option == "--export" else "mine.html"), "mine")
    refuse("inspect", graph, option, file, says=["mine", "exists", "--overwrite"])
    assert file.read_text(encoding="utf-8") == "mine"
    run("inspect", graph, option, file, "--overwrite")
    assert file.read_text(encoding="utf-8") != "mine"


def test_a_group_is_explained_by_its_members(run: Run, graph: Path) -> None:
    text = run("inspect", graph, "--explain", "l0.gate-up").out
    assert text.startswith("l0.gate-up  fusion group of 2\n")
    assert "model.layers.0.mlp.gate_proj" in text
    assert "model.layers.0.mlp.up_proj" in text
    (group,) = json.loads(run("inspect", graph, "--explain", "l0.gate-up", "--json").out)
    assert group["kind"] == "fusion"


def test_without_a_pipeline_a_target_has_nothing_to_judge(run: Run, model: Path) -> None:
    text = run("inspect", model, "--target", "sglang").out
    assert "fallback: nothing was checked against target sglang: without a pipeline, no schemes" in text
    assert "judged for" not in text


def test_an_export_keeps_its_target_when_it_is_compared(run: Run, compiled: Path, graph: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    run("inspect", compiled, "--target", "sglang", "--export", other)
    assert json.loads(other.read_text(encoding="utf-8"))["target"] == "sglang"
    for words in ((other, compiled), (compiled, other)):
        assert "nothing differs" in run("inspect", "--diff", *words).out
    assert "target" in run("inspect", "--diff", other, graph).out  # neither can be judged again


def test_full_shows_what_is_folded_otherwise(run: Run, graph: Path) -> None:
    short, long = run("inspect", graph).out, run("inspect", graph, "--full").out
    assert "%embedding" not in short
    assert "scaled_dot_product_attention(" not in short
    assert "scaled_dot_product_attention(" in long


def test_piped_lines_are_plain_and_whole(run: Run, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for view in ((), ("--tree",), ("--explain", "lm_head")):
        out = run("inspect", graph, *view).out
        assert "\x1b" not in out
        assert "…" not in out
        assert not re.search(r" $", out, re.MULTILINE)


def test_on_a_terminal_lines_are_coloured_and_fit(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "64")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setattr(sys, "argv", ["qcompiler", "inspect", str(graph)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "\x1b[36mw:int8/channel" in terminal.getvalue()
    table = [line for line in re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()).splitlines() if line.startswith("  ")]
    assert max(map(len, table)) <= 64


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--explain", "model.layers.0.mlp.upproj"], ["no node", "did you mean 'model.layers.0.mlp.up_proj'"]),
        (["--explain", "up_proj"], ["part of model.layers.0.mlp.up_proj", "say model.layers.0.mlp.up_proj"]),
        (["--export", "graph.png"], ["no export is called '.png'", ".graphml"]),
        (["--export", "no/such/folder/graph.dot"], ["there is no folder no/such/folder"]),
        (["--explain", "l0.gateup"], ["no node", "did you mean 'l0.gate-up'"]),
        (["--pipeline", "w8a8-rtn"], ["is an exported graph", "leave --pipeline and --after out"]),
        (["--dtype", "float32"], ["is an exported graph", "leave --dtype out"]),
        (["--target", "sglang"], ["judged for vllm-sm80: sglang cannot judge it now", "leave --target out"]),
    ],
)
def test_bad_words_are_refused(arguments: list[str], says: list[str], refuse: Refuse, graph: Path) -> None:
    refuse("inspect", graph, *arguments, says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tree", "--explain", "lm_head"], ["for --tree:", "cannot be combined with --explain"]),
        (["--diff", "a", "b", "--export", "g.dot"], ["for --diff:", "cannot be combined with --export"]),
        (["--explain", "lm_head", "--full"], ["for --full:", "graph as text or tree"]),
        (["--tree", "--json"], ["for --json:", "--tree"]),
        (["--after", "assign"], ["for --after:", "it needs --pipeline"]),
        (["--independent"], ["for --independent:", "it needs --pipeline"]),
        (["--overwrite"], ["for --overwrite:", "for the file of --export or --html"]),
        (["-p", "w4a16", "--after", "assign", "--diff", "a", "b"], ["for --after:", "--diff says itself"]),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str], says: list[str], refuse: Refuse, graph: Path
) -> None:
    refuse("inspect", graph, *arguments, says=says, usage=True)


def test_a_model_is_asked_for_where_one_is_needed(refuse: Refuse) -> None:
    refuse("inspect", says=["MODEL", "only --diff of two folders needs none"], usage=True)
    refuse("inspect", "--diff", "w4a16", "w8a8-rtn", says=["--diff of two pipelines needs a MODEL"])
    refuse("inspect", "-p", "w4a16", "--diff", "capture", "assign", says=["--diff of two passes needs a MODEL"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", "w8a8-rtn", "--diff", "asign", "legalize"], ["no pass 'asign'", "did you mean 'assign'"]),
        (["-p", "w8a8-rtn", "--diff", "assign", "lower"], ["lower needs weights", "compile, and inspect the output"]),
        (["-p", "w8a8-rtn", "--after", "nothing"], ["no pass 'nothing'", "say one of capture, assign"]),
        (["--diff", "assign", "legalize"], ["--diff assign: there is no such folder", "say of which --pipeline"]),
        (["--diff", "w8a8-rtm", "w4a16"], ["--diff w8a8-rtm", "did you mean 'w8a8-rtn'"]),
    ],
)
def test_passes_and_pipelines_that_are_none_are_refused(
    arguments: list[str], says: list[str], refuse: Refuse, model: Path
) -> None:
    refuse("inspect", model, *arguments, says=says)


def test_what_is_compared_must_be_of_one_kind_and_unambiguous(
    refuse: Refuse, model: Path, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse("inspect", "--diff", model, "w4a16", says=["two of one kind", "w4a16 is a pipeline"])
    refuse("inspect", model, "--diff", compiled, compiled, says=["no part in it", "leave MODEL out"])
    refuse("inspect", model, "-p", "w4a16", "--diff", compiled, "assign", says=["two of its passes", "folder"])
    for name in ("w4a16", "w8a8-rtn"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    refuse("inspect", model, "--diff", "w4a16", "w8a8-rtn", says=["and of a folder here", "write ./w4a16"])


def test_files_and_folders_that_are_nothing_are_refused(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    refuse("inspect", write(tmp_path / "graph.json", "{}"), says=["is no exported graph", "source: Field required"])
    refuse("inspect", model / "config.json", says=["is no exported graph", "inspect --export FILE.json"])
    refuse("inspect", write(tmp_path / "graph.dot", "digraph {}"), says=["is no exported graph"])
    refuse("inspect", tmp_path, says=["holds no config.json"])
    refuse("inspect", tmp_path / "nowhere", says=["there is no such folder"])


def test_a_damaged_checkpoint_is_refused(refuse: Refuse, compiled: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compiled, tmp_path / "damaged")
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    refuse("inspect", folder, says=[shard.name, "truncated"])
    shutil.copy(compiled / shard.name, shard)
    (folder / "qcompiler.json").write_text("{", encoding="utf-8")
    refuse("inspect", folder, says=["qcompiler.json is truncated"])


def test_a_checkout_has_a_script_of_its_own(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "tools" / "inspect_graph.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, script, "--help"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Usage: qcompiler inspect [OPTIONS] [MODEL]" in ran.stdout


def test_one_node_is_printed_as_json(run: Run, graph: Path) -> None:
    ran = run("inspect", graph, "--explain", "model.layers.0.mlp.up_proj", "--json")
    assert json.loads(ran.out)["because"] == ["assign: rule 1"]
    assert ran.out.endswith("}\n")
