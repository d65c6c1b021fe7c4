"""What people and programs read on standard output when nothing is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from pathlib import Path

import pytest
from safetensors import safe_open

from passes.assign import Assign
from qcompiler.demo import evaluation_text, model_path
from qcompiler.pipeline import load_pipeline, parse_pipeline
from qcompiler.pipeline.independent import independent_runs
from qcompiler.pipeline.registry import packaged_pipelines, pass_classes
from tests.cli.command import PIPELINE, Ran, finish, pipeline_file, start
from tests.cli.conftest import Run

COLUMNS = [
    "layers",
    "linear",
    "structure",
    "shape",
    "scheme",
    "by",
    "bits/weight",
    "bytes",
    "error",
    "seconds",
    "because",
]
"""Of a compilation that measures no outputs."""


def table(out: str) -> list[dict[str, str]]:
    """The rows of the printed report, by the names of its columns: two spaces part them in every line."""
    lines = out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.split() == COLUMNS)
    lines = lines[first : lines.index("", first)]
    width = max(map(len, lines))
    inked = "".join(" " if {line.ljust(width)[at] for line in lines} == {" "} else "x" for at in range(width))
    columns = [slice(*match.span()) for match in re.finditer(r"x+( x+)*", inked)]
    return [dict(zip(COLUMNS, [line[column].strip() for column in columns], strict=True)) for line in lines[1:]]


def tensor_bytes(folder: Path) -> int:
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            total += file.stat().st_size - 8 - struct.unpack("<Q", opened.read(8))[0]
    return total


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """The demo model, compiled by a process of its own whose output is piped."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, finish(start("compile", model_path(), "--pipeline", "int4-int8-rtn", "--output", out))


def test_the_demo_compiles_with_a_line_for_each_kind_of_layer_and_totals_that_are_on_disk(
    demo: tuple[Path, Ran],
) -> None:
    out, ran = demo
    assert (ran.code, ran.err) == (0, "")
    assert not {"\x1b", "\r", "\u2501"} & set(ran.out), "no bar, and nothing that only a terminal understands"
    assert ran.out.startswith(f"{model_path()}: int4-int8-rtn for vllm-sm90\n")
    assert not [line for line in ran.out.splitlines() if line != line.rstrip()]
    rows = {row["linear"].rpartition(".")[2]: row for row in table(ran.out)}
    assert list(rows) == [*("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "lm_head"]
    assert {row["layers"] for name, row in rows.items() if name != "lm_head"} == {"0-3"}
    down = rows["down_proj"]
    assert (down["structure"], down["shape"], down["scheme"]) == ("mlp-output", "256x512", "w:int8/g128")
    assert (down["bits/weight"], down["because"]) == ("8.13", "assign: rule 1")
    assert re.fullmatch(r"\d\.\d\de-\d\d \(max \d\.\d\de-\d\d\)", down["error"])
    assert (down["by"], float(down["seconds"]) >= 0) == ("rtn", True)
    assert (rows["lm_head"]["scheme"], rows["lm_head"]["error"]) == ("dense", "")
    assert f"({tensor_bytes(out):,} bytes), 1.90 times smaller than" in ran.out
    assert "config: 28 of 29 sites quantized" in ran.out
    timed = re.search(r"^time: (.*)$", ran.out, re.MULTILINE)
    assert timed
    spent = re.findall(r"([a-z-]+) \d+\.\d\ds", timed[1])
    assert spent[:6] == ["capture", "assign", "legalize", "insert-observers", "calibrate", "lower"]
    assert ran.out.endswith(f"wrote {out}\n")


def test_the_demo_verifies_against_its_model_on_text_it_has_not_seen(demo: tuple[Path, Ran], run: Run) -> None:
    args = ["verify", demo[0], "--reference", model_path(), "--text", evaluation_text(), "--sequences", "4"]
    ran = run(*args)
    assert (ran.code, ran.err) == (0, "")
    assert "nothing missing, unexpected or mismatched" in ran.out
    assert "logits against the compiled graph: equal to the last bit" in ran.out
    assert re.search(r"perplexity \d+\.\d+ against \d+\.\d+ dense \(\+\d\.\d\d%\)", ran.out)
    assert re.search(
        r"KL divergence: mean 0\.\d+, median 0\.\d+, 99% \d\.\d+, max \d\.\d+ nats over 1020 tokens", ran.out
    )
    measured = json.loads(run(*args, "--json").out)
    assert measured["fidelity"]["tokens"] == 1020
    assert 0 < measured["fidelity"]["against"]["kl_mean"] < 0.1


def test_json_is_the_same_report_for_programs(model: Path, run: Run, results: Path) -> None:
    planned = json.loads(run("plan", model, "-p", "w8a8-rtn", "--json").out)
    ran = run("compile", model, "-p", "w8a8-rtn", "-o", results / "out", "--json")
    assert (ran.code, ran.err) == (0, "")
    report = json.loads(ran.out)
    assert report["total_bytes"] == planned["total_bytes"] == tensor_bytes(results / "out")
    assert all(layer["error"] is None for layer in planned["layers"])
    assert all((layer["error"] is None) == (layer["scheme"] is None) for layer in report["layers"])
    measured = {"error", "seconds"}
    assert all(report["layers"][0][name] is not None for name in measured)
    for compiled, expected in zip(report["layers"], planned["layers"], strict=True):
        assert {name for name in compiled if compiled[name] != expected[name]} <= measured


def test_a_plan_reads_no_weight(model: Path, broken: Path, run: Run) -> None:
    """Every byte after the header is spoilt; then the file is gone."""
    file = broken / "model.safetensors"
    with file.open("r+b") as opened:
        start = 8 + struct.unpack("<Q", opened.read(8))[0]
        opened.seek(start)
        opened.write(b"\xff" * (file.stat().st_size - start))
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("model.norm.weight").isnan().all()
    good, spoilt = (json.loads(run("plan", folder, "-p", "w8a8-rtn", "--json").out) for folder in (model, broken))
    assert spoilt["layers"] == good["layers"]
    assert spoilt["total_bytes"] == good["total_bytes"]
    file.unlink()
    ran = run("plan", broken, "-p", "w8a8-rtn")
    assert (ran.code, ran.err) == (0, "")
    assert f"({good['total_bytes']:,} bytes)" in ran.out
    assert "note: no weight files: names on disk were not checked" in ran.out


def test_what_was_done_instead_is_printed_as_a_fallback(model: Path, tmp_path: Path, run: Run) -> None:
    """176 does not divide by 32; and no pass looks at the target."""
    changes = ("group_size: 16", "group_size: 32"), ("- assign:", "- assign:\n      on_indivisible: channel")
    ran = run(
        "plan",
        model,
        "-p",
        pipeline_file(tmp_path, *changes, ("  - legalize: {target: transformers}\n", "")),
        "-t",
        "sglang",
    )
    assert (ran.code, ran.err) == (0, "")
    assert (
        "\nfallback: group size 32 does not divide the 176 inputs of model.layers.0.mlp.down_proj: channel" in ran.out
    )
    assert "\nfallback: nothing was checked against target sglang" in ran.out


def test_graphs_are_printed_after_the_passes_asked_for(model: Path, run: Run, results: Path) -> None:
    args = [
        "compile",
        model,
        "-p",
        "w8a8-rtn",
        "-o",
        results / "out",
        "--print-after",
        "assign",
        "--print-after",
        "lower",
    ]
    ran = run(*args)
    assert (ran.code, ran.err) == (0, "")
    assert re.findall(r"^after (\S+):\ngraph \w+ \((\w+)\)$", ran.out, re.MULTILINE) == [
        ("assign", "annotated"),
        ("lower", "lowered"),
    ]
    assigned, lowered = ran.out.split("after lower:")
    assert re.search(r"%l0.mlp.down_proj = linear\(%\w+\) \[B,S,64\]  w:int8/channel .*; assign: rule 1\n", assigned)
    assert re.search(r"%l0.mlp.down_proj = quantized_linear\(", lowered)


def test_graphs_are_printed_without_what_lies_between_layers(model: Path, run: Run) -> None:
    args = ("plan", model, "-p", "w8a8-rtn", "--print-after", "assign")
    whole, leaves = (run(*args, *option) for option in ((), ("--leaves",)))
    lines, fewer = (ran.out.partition("\n\n")[0].splitlines() for ran in (whole, leaves))
    assert set(fewer) < set(lines)
    assert [line for line in lines if " = linear(" in line] == [line for line in fewer if " = linear(" in line] != []
    assert all(re.search(r" = (linear|norm|embedding)\(", line) for line in fewer[2:])


def test_the_printed_pipeline_is_the_pipeline(model: Path, tmp_path: Path, run: Run) -> None:
    printed, _, rest = run("plan", model, "-p", pipeline_file(tmp_path), "--print-pipeline").out.partition("\n\n")
    assert parse_pipeline(printed) == parse_pipeline(PIPELINE)
    assert rest.startswith(f"{model}: test for transformers\n")


def test_the_printed_pipeline_has_independent_runs_where_they_are_asked_for(
    model: Path, tmp_path: Path, run: Run
) -> None:
    rule = "{select: {structure: mlp-output}, scheme: {weights: {bits: 8, group_size: 16}}, solver: gptq}"
    changes = ((", mlp-output]", "]"), ("      rules:\n", f"      rules:\n        - {rule}\n"))
    file = pipeline_file(tmp_path, *changes)
    ran = run("plan", model, "-p", file, "--independent", "--print-pipeline")
    assert (ran.code, ran.err) == (0, "")
    printed = parse_pipeline(ran.out.partition("\n\n")[0])
    assert printed == independent_runs(load_pipeline(file))
    assert [item.name for item in printed.flat()].count("calibrate") == 2


def test_passes_lists_every_pass_with_its_options_and_every_pipeline(run: Run) -> None:
    ran = run("passes")
    assert (ran.code, ran.err) == (0, "")
    for name in pass_classes():
        assert re.search(rf"^{name}\b.*\(.*(annotated|observed|calibrated|captured)", ran.out, re.MULTILINE), name
    for option in (field.name for field in dataclasses.fields(Assign)):
        assert re.search(rf"^ +{option}: ", ran.out, re.MULTILINE), option
    for name in packaged_pipelines():
        assert re.search(rf"^  {re.escape(name)} +\S", ran.out, re.MULTILINE), name
