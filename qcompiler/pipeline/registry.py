"""Passes and packaged pipelines are found through entry points, so that any installed package can add its own."""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.resources import files
from typing import TYPE_CHECKING

from qcompiler.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from qcompiler.pipeline.base import Pass

PASSES = "qcompiler.passes"
"""Entry-point group of passes: `name = "package.module:PassClass"`."""

PIPELINES = "qcompiler.pipelines"
"""Entry-point group of packages that hold pipelines as `*.yaml`: `name = "package"`."""


def pass_classes() -> dict[str, type[Pass]]:
    """Every installed pass by name. Raises `ConfigError` where two packages claim one name, or one does not load."""
    from qcompiler.pipeline.base import Pass

    found: dict[str, type[Pass]] = {}
    for point in sorted(entry_points(group=PASSES), key=lambda p: p.name):
        try:
            loaded = point.load()
        except Exception as error:
            raise ConfigError(
                f"pass {point.name!r} ({point.value}) does not load: {error}",
                hint="repair or uninstall the package that provides it",
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
            raise ConfigError(f"entry point {point.name!r} ({point.value}) is not a subclass of qcompiler.Pass")
        if loaded.name != point.name:
            raise ConfigError(f"pass {point.value} is registered as {point.name!r}, but its name is {loaded.name!r}")
        if found.setdefault(point.name, loaded) is not loaded:
            raise ConfigError(f"two packages provide a pass {point.name!r}: {found[point.name]} and {loaded}")
    return found


def pass_class(name: str) -> type[Pass]:
    """The pass of this name. Raises `ConfigError` with near names."""
    classes = pass_classes()
    if name not in classes:
        raise ConfigError(f"unknown pass {name!r}{did_you_mean(name, classes)}", hint=f"passes: {', '.join(classes)}")
    return classes[name]


def packaged_pipelines() -> dict[str, str]:
    """The text of every packaged pipeline, by name."""
    found: dict[str, str] = {}
    for point in entry_points(group=PIPELINES):
        for resource in files(point.value).iterdir():
            if resource.name.endswith(".yaml"):
                found[resource.name.removesuffix(".yaml")] = resource.read_text(encoding="utf-8")
    return dict(sorted(found.items()))
