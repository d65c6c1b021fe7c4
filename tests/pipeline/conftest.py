"""Installed packages with passes and pipelines of their own: modules and a dist-info folder on `sys.path`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

Install = Callable[..., Path]
"""`install(project, files, passes={"name": "module:Class"}, pipelines={"name": "package"})`; returns the folder."""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package for one test. What is imported of it is forgotten afterwards."""
    before = set(sys.modules)

    def into(
        project: str,
        files: Mapping[str, str],
        *,
        passes: Mapping[str, str] | None = None,
        pipelines: Mapping[str, str] | None = None,
    ) -> Path:
        folder = tmp_path / project
        info = folder / f"{project.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n", encoding="utf-8")
        groups = {"qcompiler.passes": passes or {}, "qcompiler.pipelines": pipelines or {}}
        lines = [
            f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(folder)
        return folder

    yield into
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
