"""A Transformers that is too old is said to be, before anything of it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler import requirements
from qcompiler.errors import CaptureError


@pytest.mark.parametrize("found", ["4.57.1", "5.5.0", "5.15.9"])
def test_an_old_transformers_is_refused_with_what_to_install(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "version", lambda name: found)
    with pytest.raises(CaptureError, match=rf"Transformers {found} is too old[\s\S]*install transformers>=5\.16"):
        requirements.check_transformers()


@pytest.mark.parametrize("found", ["5.16", "5.17.0", "6.0"])
def test_a_newer_one_is_not(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "version", lambda name: found)
    requirements.check_transformers()


def test_the_command_and_the_api_say_so_before_they_import_it(tmp_path: Path) -> None:
    """With an old distribution first on the path, whose modules could not be imported at all."""
    info = tmp_path / "transformers-4.57.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n")
    (tmp_path / "transformers.py").write_text("raise ImportError('imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for code in ("from qcompiler.cli import main; main()", "import qcompiler; qcompiler.compile"):
        command = [sys.executable, "-c", code, "plan", "nowhere", "--pipeline", "w4a16"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode != 0
        assert "Transformers 4.57.1 is too old" in done.stderr
        assert "imported" not in done.stderr
