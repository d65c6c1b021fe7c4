"""Outputs that cannot or must not be written, and disks that are full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcompiler
from tests.cli.command import contents, write
from tests.cli.conftest import Refuse, Run
from tests.disks import mounted


@pytest.fixture
def old(results: Path) -> Path:
    """An output that was there before."""
    folder = make_old(results / "out")
    write(folder / "stale.txt", "old")
    return folder


def make_old(folder: Path) -> Path:
    """A folder that passes for a compiled checkpoint."""
    folder.mkdir()
    write(folder / "config.json", "old")
    write(folder / "qcompiler.json", "{}")
    return folder


def test_an_output_that_exists_is_not_touched(old: Path, model: Path, refuse: Refuse) -> None:
    before = contents(old)
    refuse("compile", model, "-p", "w8a8-rtn", says=[f"{old}: the output exists", "--overwrite"])
    assert contents(old) == before


def test_overwriting_replaces_the_old_output_as_a_whole(old: Path, model: Path, run: Run, results: Path) -> None:
    assert run("compile", model, "-p", "w8a8-rtn", "-o", old, "--overwrite").code == 0
    assert "stale.txt" not in contents(old)
    assert os.listdir(results) == ["out"]


def test_a_failure_while_overwriting_leaves_the_old_output(old: Path, broken: Path, refuse: Refuse) -> None:
    """The weights are found to be damaged when half of them are written."""
    file = broken / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-2] + b"\xff\xff")
    before = contents(old)
    refuse("compile", broken, "-p", "w8a8-rtn", "--overwrite", says=["NaN"])
    assert contents(old) == before


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (".", "the output is the input"),
        ("sub", "the output lies inside the input"),
        ("..", "the output contains the in"),
    ],
)
def test_output_and_model_lie_apart(where: str, says: str, broken: Path, refuse: Refuse) -> None:
    for name in ("config.json", "qcompiler.json"):  # these folders look like compiled ones
        write(broken.parent / name, "{}")
    write(broken / "qcompiler.json", "{}")
    before = contents(broken)
    refuse("compile", broken, "-p", "w8a8-rtn", "--overwrite", "--output", broken / where, says=[says, "apart"])
    assert contents(broken) == before


def test_a_model_that_was_not_compiled_is_never_replaced(broken: Path, model: Path, refuse: Refuse) -> None:
    before = contents(broken)
    args = ["compile", model, "-p", "w8a8-rtn", "--overwrite", "--output", broken]
    refuse(*args, says=[str(broken), "no qcompiler.json", "choose another", "delete this one yourself"])
    assert contents(broken) == before


def test_what_is_no_model_folder_is_never_replaced(results: Path, model: Path, refuse: Refuse) -> None:
    (results / "home").mkdir()
    file = write(results / "home" / "thesis.tex", "years of work")
    args = ["compile", model, "-p", "w8a8-rtn", "--overwrite", "--output"]
    refuse(*args, results / "home", says=[str(results / "home"), "no config.json", "choose another"])
    refuse(*args, file, says=[f"{file}: a file of this name exists", "choose another"])
    refuse(*args, file / "out", says=[str(file / "out"), "Not a directory"])
    assert file.read_text() == "years of work"


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_dot_is_the_folder_that_it_names(
    flags: tuple[str, ...], model: Path, results: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(results / "thesis.tex", "years of work")
    monkeypatch.chdir(results)
    says = [f"{results}: it has no config.json" if flags else f"{results}: the output exists"]
    assert refuse("compile", model, "-p", "w8a8-rtn", *flags, "--output", ".", says=says) == refuse(
        "compile", model, "-p", "w8a8-rtn", *flags, "--output", results, says=says
    )


def test_a_link_that_leads_back_to_itself_is_no_output(results: Path, model: Path, refuse: Refuse) -> None:
    loop = results / "loop"
    loop.symlink_to("loop")
    refuse("compile", model, "-p", "w8a8-rtn", "--output", loop, says=[f"{loop}: ", "choose"])


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250])
def test_a_name_too_long_for_the_file_system_is_refused(name: str, results: Path, model: Path, refuse: Refuse) -> None:
    refuse("compile", model, "-p", "w8a8-rtn", "--output", results / name, says=["File name too long", "choose"])


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing can be made; root may write wherever a file system lets it."""
    folder = tmp_path / "unwritable"
    if os.geteuid() == 0:
        with mounted(folder, "ro"):
            yield folder
    else:
        folder.mkdir(mode=0o500)
        yield folder


@pytest.mark.parametrize("inside", ["out", "new/out"])
def test_a_folder_that_cannot_be_written_is_refused(inside: str, unwritable: Path, model: Path, refuse: Refuse) -> None:
    out = unwritable / inside
    refuse("compile", model, "-p", "w8a8-rtn", "--output", out, says=[str(out), "Permission denied", "can be written"])


PAGE = 4096
"""What a tmpfs counts in."""


def pages(*sizes: int) -> int:
    return sum(-(-size // PAGE) * PAGE for size in sizes)


@pytest.mark.parametrize("moment", ["at the start", "in a shard", "after the shards"])
def test_a_disk_that_is_full_leaves_the_old_output(
    moment: str, model: Path, compiled: Path, tmp_path: Path, refuse: Refuse
) -> None:
    predicted = qcompiler.plan(model, "w8a8-rtn").report.total_bytes
    shards = [file.stat().st_size for file in compiled.glob("*.safetensors")]
    room = {
        "at the start": predicted // 2,
        "in a shard": predicted + 2 * PAGE,
        "after the shards": pages(*shards, PAGE),
    }
    with mounted(tmp_path / "disk", f"size={pages(room[moment]) + 2 * PAGE}") as disk:
        old = make_old(disk / "out")
        before = contents(disk)
        args = ["compile", model, "-p", "w8a8-rtn", "--overwrite", "--output", old]
        message = refuse(*args, says=[f"{old}: the disk is full", "are free", "hint: free space"])
        assert contents(disk) == before
        assert os.listdir(disk) == ["out"]
    at_once, while_writing = f"{predicted} more bytes are needed" in message, "more bytes are needed" in message
    assert (at_once, while_writing) == (moment == "at the start", moment != "after the shards")


def test_a_mount_point_is_refused_because_it_cannot_be_exchanged(tmp_path: Path, model: Path, refuse: Refuse) -> None:
    with mounted(tmp_path / "volume", "size=64k") as volume:
        args = ["compile", model, "-p", "w8a8-rtn", "--overwrite", "--output", volume]
        refuse(*args, says=[f"{volume}: ", "mount point", "a folder inside it"])
