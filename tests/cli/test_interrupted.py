"""A run that ends in the middle: killed, interrupted, or by a defect. The old output stays whole, or there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import contents, finish, pipeline_file, start, write
from tests.cli.conftest import Run
from tests.pipeline.conftest import Install

OTHERS = """
from dataclasses import dataclass
from time import sleep
from typing import ClassVar, Literal

from qcompiler import GraphPass, StreamingPass
from qcompiler.ir.graph import Stage
from qcompiler.pipeline import PartitionStep

@dataclass(frozen=True, kw_only=True)
class Stall(StreamingPass):
    name: ClassVar[str] = "stall"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CALIBRATED, Stage.LOWERED})
    how: Literal["sleep", "raise", "refuse to begin", "refuse to finish"] = "sleep"

    def begin(self, graph, context):
        if self.how == "refuse to begin":
            raise RuntimeError("a defect where a sweep begins")
        return Step(self.how)

class Step(PartitionStep):
    def __init__(self, how):
        self.how = how
        self.seen = 0

    def partition(self, work):
        self.seen += 1
        if self.seen == 2:
            if self.how == "raise":
                raise RuntimeError("a defect in the second partition")
            if self.how == "sleep":
                sleep(600)

    def finish(self):
        if self.how == "refuse to finish":
            raise RuntimeError("a defect at the end of a sweep")

@dataclass(frozen=True, kw_only=True)
class Inspect(GraphPass):
    name: ClassVar[str] = "inspect"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.LOWERED})
    fails: bool = False

    def run(self, graph, context):
        if self.fails:
            raise RuntimeError("a defect after the checkpoint was written")
        context.report.info("inspected the lowered graph")
"""
"""A pass that ends or halts a run at its second partition, when the first shard is written."""


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Started in a shell's background, tests would ignore SIGINT, and so would the processes that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def packages(install: Install) -> Path:
    passes = {"stall": "others:Stall", "inspect": "others:Inspect"}
    return install("others", {"others.py": OTHERS}, passes=passes)


@pytest.fixture
def old(run: Run, model: Path, results: Path) -> dict[str, bytes]:
    """What an earlier run left in `results / "out"`."""
    assert run("compile", model, "-p", "w8a8-rtn", "-o", results / "out").code == 0
    return contents(results)


def stalled(model: Path, results: Path, packages: Path, file: Path) -> subprocess.Popen[str]:
    """A run that has written its first shard, and no other."""
    args = ["compile", model, "-p", file, "-o", results / "out", "--overwrite"]
    process = start(*args, packages=packages)
    shard = results / ".out.partial" / "checkpoint" / "model-00001-of-00003.safetensors"
    while not shard.exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.05)
    return process


@pytest.fixture
def stalling(tmp_path: Path) -> Path:
    return pipeline_file(tmp_path, ("  - lower\n", "  - stall\n  - lower\n"))


def untouched(results: Path, old: dict[str, bytes]) -> bool:
    return {name: data for name, data in contents(results).items() if name in old} == old


def test_kill_9_leaves_the_old_output_and_a_later_run_succeeds(
    old: dict[str, bytes], run: Run, model: Path, results: Path, packages: Path, tmp_path: Path
) -> None:
    """In a second run over the data, so that the first has left something for it."""
    attention = "  - calibrate: {select: [{structure: [attention-input, attention-output]}]}\n"
    runs = pipeline_file(tmp_path, ("  - calibrate\n  - lower\n", f"{attention}  - calibrate\n  - stall\n  - lower\n"))
    process = stalled(model, results, packages, runs)
    again = ["compile", model, "-p", "w8a8-rtn", "-o", results / "out", "--overwrite"]
    ran = run(*again)
    assert (ran.code, ran.out) == (2, "")
    assert f"error: {results / 'out'}: another run is writing it" in ran.err
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    assert untouched(results, old)
    assert sorted(os.listdir(results)) == [".out.partial", ".out.sweeps", "out"]
    ran = run(*again)
    assert (ran.code, ran.err) == (0, "")
    whole = (results / "out" / "qcompiler.json").read_bytes()
    assert contents(results) == {**old, "out/qcompiler.json": whole}, "the same model and pipeline give the same bytes"
    before = json.loads(old["out/qcompiler.json"])
    assert {**json.loads(whole), "timings": before["timings"]} == before


def test_control_c_leaves_the_old_output_alone_and_no_traceback(
    old: dict[str, bytes], model: Path, results: Path, packages: Path, stalling: Path
) -> None:
    process = stalled(model, results, packages, stalling)
    process.send_signal(signal.SIGINT)
    ran = finish(process)
    assert (ran.code, ran.out, ran.err) == (130, "", "interrupted\n")
    assert contents(results) == old


@pytest.mark.parametrize("library", ["typer", "torch"])
def test_control_c_while_libraries_are_imported_is_one_line_too(library: str, tmp_path: Path, results: Path) -> None:
    write(tmp_path / f"{library}.py", "print('importing', flush=True)\nfrom time import sleep\nsleep(600)\n")
    process = start("compile", "none", "-p", "w8a8-rtn", "-o", results / "out", packages=tmp_path)
    assert process.stdout
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    ran = finish(process)
    assert (ran.code, ran.out, ran.err) == (130, "", "interrupted\n")


def test_a_defect_keeps_its_traceback_and_leaves_no_partial_folder(
    model: Path, results: Path, tmp_path: Path, packages: Path
) -> None:
    file = pipeline_file(tmp_path, ("  - lower\n", "  - stall: {how: raise}\n  - lower\n"))
    ran = finish(start("compile", model, "-p", file, "-o", results / "out", packages=packages))
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("Traceback (most recent call last)")
    assert ran.err.endswith("RuntimeError: a defect in the second partition\n")
    assert os.listdir(results) == []


def test_a_pass_that_does_not_begin_ends_those_that_did(
    run: Run, model: Path, results: Path, tmp_path: Path, packages: Path
) -> None:
    file = pipeline_file(tmp_path, ("  - lower\n", "  - lower\n  - stall: {how: refuse to begin}\n"))
    with pytest.raises(RuntimeError, match="where a sweep begins"):
        run("compile", model, "-p", file, "-o", results / "out")
    assert os.listdir(results) == []


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ("inspect: {fails: true}", "after the checkpoint was written"),
        ("stall: {how: refuse to finish}", "at the end of a sweep"),
    ],
)
def test_a_pass_that_fails_after_the_checkpoint_was_written_leaves_the_old_output(
    last: str, says: str, old: dict[str, bytes], run: Run, model: Path, results: Path, tmp_path: Path, packages: Path
) -> None:
    file = pipeline_file(tmp_path, ("  - lower\n", f"  - lower\n  - {last}\n"))
    with pytest.raises(RuntimeError, match=says):
        run("compile", model, "-p", file, "-o", results / "out", "--overwrite")
    assert contents(results) == old


def test_what_a_pass_says_after_the_checkpoint_was_written_is_in_its_provenance(
    run: Run, model: Path, results: Path, tmp_path: Path, packages: Path
) -> None:
    file = pipeline_file(tmp_path, ("  - lower\n", "  - lower\n  - inspect\n"))
    assert run("compile", model, "-p", file, "-o", results / "out").code == 0
    written = json.loads(contents(results)["out/qcompiler.json"])
    assert "inspected the lowered graph" in [note["text"] for note in written["report"]["notes"]]
    assert written["versions"]["others"] == "1.0", "the package of that pass"
