"""How the tests of compilations are spread over processes."""

from __future__ import annotations

from pathlib import Path

import pytest

_COMPILED_ONCE = ("case", "packaged")
"""Fixtures that compile something for several tests."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `pytest -n`, `--dist loadgroup` keeps the tests of one compilation in one process."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    here = [item for item in items if item.path.parent == Path(__file__).parent and isinstance(item, pytest.Function)]
    for item in here:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        for name in _COMPILED_ONCE:
            if name in params:
                item.add_marker(pytest.mark.xdist_group(f"{name}: {params[name]}"))
