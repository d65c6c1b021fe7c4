"""How the files that hold the targets are read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from qcompiler.targets import load_target, model, target_names


@pytest.fixture
def unread() -> Iterator[None]:
    """Before and after the test no target file has been read."""
    cached = (model.target_names, model.load_target, model.fused_tables, model._read)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("unread")
def test_targets_are_the_same_without_libyaml(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = {name: load_target(name) for name in target_names()}
    for function in (model.load_target, model._read):
        function.cache_clear()
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert {name: load_target(name) for name in target_names()} == with_it


@pytest.mark.usefixtures("unread")
def test_each_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    parse = yaml.load

    def load(text: str, **options: object) -> object:
        texts.append(text)
        return parse(text, **options)

    monkeypatch.setattr(yaml, "load", load)
    for name in target_names():
        load_target(name)
    assert len(set(texts)) == len(texts) > len(target_names())
