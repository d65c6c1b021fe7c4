"""`qcompiler check` as people and CI use it: text, JSON, exit codes, targets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qcompiler
import qcompiler.check.run
from qcompiler.check import KINDS, CheckReport, Finding, Severity
from qcompiler.check.text import report_lines
from qcompiler.errors import ConfigError
from tests.check.checkpoints import DOWN, GATE, UP
from tests.check.conftest import Base
from tests.check.traps import gate_symmetric_and_up_asymmetric, linear_takes_the_head
from tests.cli.conftest import Refuse

Run = Callable[..., Any]


def test_a_sound_checkpoint_ends_with_0(base: Base, tmp_path: Path, run: Run) -> None:
    ran = run("check", base("channel").write(tmp_path / "sound"))
    assert ran.code == 0
    assert "7 of 8 linears are quantized" in ran.out
    assert ran.err == ""


def test_an_error_ends_with_1_and_is_told_with_its_mend(base: Base, tmp_path: Path, run: Run) -> None:
    edited = base("packed")
    gate_symmetric_and_up_asymmetric(edited)
    ran = run("check", edited.write(tmp_path / "broken"))
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert lines[0] == "error: fused-shards-differ: model.layers.0.mlp.gate_up_proj [vllm, sglang, sglang 0.5.10]"
    assert "w:int4/g16/asym" in lines[1]
    assert lines[2] == "  mend: give gate_proj, up_proj one scheme, and compile again"
    assert "1 error, " in lines[-1]


def test_json_is_for_ci(base: Base, tmp_path: Path, run: Run) -> None:
    edited = base("packed")
    linear_takes_the_head(edited)
    ran = run("check", edited.write(tmp_path / "broken"), "--json")
    assert ran.code == 1
    data = json.loads(ran.out)
    keys = ["schema_version", "checkpoint", "target", "ok", "linears", "quantized", "scales", "findings"]
    assert list(data) == keys  # under version 1; see README
    assert list(data["findings"][0]) == ["severity", "code", "layer", "loaders", "message", "mend"]
    assert data["schema_version"] == 1
    assert (data["ok"], data["linears"], data["quantized"], data["target"]) == (False, 8, 7, None)
    assert {finding["code"] for finding in data["findings"]} <= KINDS.keys()
    first = data["findings"][0]
    assert first["severity"] == "error"
    assert first["code"] == "head-by-class"
    assert first["layer"] == "lm_head"
    assert first["loaders"] == ["transformers"]


def test_findings_that_differ_in_their_layer_are_told_together(base: Base, tmp_path: Path, run: Run) -> None:
    edited = base("packed")
    for name in (GATE, UP, DOWN):
        edited.change(f"{name}.weight_scale", lambda scale: scale * float("nan"))
    ran = run("check", edited.write(tmp_path / "broken"))
    assert sum(line.startswith("error: ") for line in ran.out.splitlines()) == 1
    assert "error: scale-not-finite: model.layers.*.mlp.{gate_proj,up_proj,down_proj} (3) [" in ran.out
    assert "3 errors" in ran.out.splitlines()[-1]


def test_a_target_judges_schemes_and_shapes(base: Base, tmp_path: Path, run: Run) -> None:
    edited = base("nvfp4")
    folder = edited.write(tmp_path / "checkpoint")
    assert run("check", folder).code == 0
    ran = run("check", folder, "--target", "vllm-cpu", "--json")
    assert ran.code == 1
    errors = [finding for finding in json.loads(ran.out)["findings"] if finding["severity"] == "error"]
    assert {finding["code"] for finding in errors} == {"illegal"}
    assert any("NVFP4" in finding["message"] and finding["layer"] == DOWN for finding in errors)


def test_for_a_target_what_concerns_other_loaders_is_a_warning(base: Base, tmp_path: Path) -> None:
    edited = base("channel")
    edited.group()["targets"] = ["Linear"]
    edited.quantization["ignore"] = []
    folder = edited.write(tmp_path / "checkpoint")
    assert list(qcompiler.check_checkpoint(folder).codes()) == ["head-by-class"]
    report = qcompiler.check_checkpoint(folder, target="vllm-sm90")
    assert report.ok
    assert [f.code for f in report.of(Severity.WARNING)] == ["head-by-class"]
    assert not qcompiler.check_checkpoint(folder, target="transformers").ok


def test_an_unknown_target_is_refused_with_near_names(base: Base, tmp_path: Path, refuse: Refuse) -> None:
    folder = base("packed").write(tmp_path / "checkpoint")
    refuse("check", folder, "--target", "vllm-sm9", says=["unknown target 'vllm-sm9'", "vllm-sm90"])
    with pytest.raises(ConfigError):
        qcompiler.check_checkpoint(folder, target="vllm")


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, model: Path, refuse: Refuse) -> None:
    refuse("check", tmp_path / "nowhere", says=["nowhere"])
    refuse("check", tmp_path, says=["no config.json"])
    refuse("check", model, says=["no quantization_config: this checkpoint is not quantized"])


def test_a_revision_is_of_a_hub_model(
    base: Base, tmp_path: Path, run: Run, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base("channel").write(tmp_path / "checkpoint")
    refuse("check", folder, "--revision", "main", says=["a folder has no revisions"])
    asked: list[tuple[str, str | None]] = []

    def resolve(model: str, *, revision: str | None = None) -> Path:
        asked.append((model, revision))
        return folder

    monkeypatch.setattr(qcompiler.check.run, "resolve_model", resolve)
    assert run("check", "owner/name", "--revision", "v1").code == 0
    assert asked == [("owner/name", "v1")]


def finding(layer: str, message: str, code: str = "tensor-shape") -> Finding:
    return Finding.of(code, layer, ("vllm",), message, "write it again")


def report(*findings: Finding) -> CheckReport:
    return CheckReport(Path("folder"), None, 9, 7, 100, findings)


def text(told: CheckReport, width: int | None = None) -> list[str]:
    return [line.plain for line in report_lines(told, width)]


def test_what_differs_in_counts_alone_is_told_once() -> None:
    findings = [finding(f"model.layers.{n}.mlp.up_proj", f"{n + 1} of 64 values are NaN") for n in range(500)]
    lines = text(report(*findings))
    assert lines[0] == "error: tensor-shape: model.layers.*.mlp.up_proj (500) [vllm]"
    assert lines[1] == "  1 of 64 values are NaN (so model.layers.0.mlp.up_proj; other numbers elsewhere)"
    assert len(lines) == 4
    assert lines[-1].startswith("folder: 500 errors; ")


def test_many_places_are_counted() -> None:
    lines = text(report(*(finding(f"part{n}.up", "it is cut") for n in range(20))))
    assert lines[0].endswith("part7.up and 12 more [vllm]")


def test_kinds_without_end_are_counted() -> None:
    lines = text(report(*(finding("(model)", f"'name{n}x' is not there") for n in range(900))))
    assert len(lines) == 62
    assert lines[-2] == "error: tensor-shape: 880 more kinds of it; `--json` has them all"


def test_schemes_are_no_counts() -> None:
    findings = [finding("a.up", "it is w:int4/g128"), finding("a.down", "it is w:int8/g128")]
    assert len(text(report(*findings))) == 7


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_is_wrapped_at_words(width: int) -> None:
    message = "loaders look for other tensors " * 9 + "model.layers.0." + "x" * 50
    lines = text(report(finding("a.up", message)), width)
    assert all(len(line) <= width or " " not in line.strip() for line in lines)
    assert " ".join(" ".join(lines).split()) == " ".join(" ".join(text(report(finding("a.up", message)))).split())
    assert sum(not line.startswith("  ") for line in lines) == 2  # of the finding, and of the sum


def test_names_move_no_cursor() -> None:
    lines = text(report(finding("\x1b[2J\ud800\u202e.up", "it is \r\n\x9b cut")))
    assert all(line.isprintable() for line in lines)
    assert r"\x1b[2J\ud800\u202e.up" in lines[0]


def test_a_terminal_has_colours() -> None:
    lines = report_lines(report(finding("a.up", "it is cut")))
    assert [str(span.style) for span in lines[0].spans] == ["bold red"]
