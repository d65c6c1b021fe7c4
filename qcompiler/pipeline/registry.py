"""Passes and packaged pipelines are found through entry points, so that any installed package can add its own."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import Distribution, EntryPoint, EntryPoints, entry_points, packages_distributions, version
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import PydanticUserError, TypeAdapter

from qcompiler.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from qcompiler.pipeline.base import Pass
    from qcompiler.pipeline.safe_yaml import Place

PASSES = "qcompiler.passes"
"""Entry-point group of passes: `name = "package.module:PassClass"`."""

PIPELINES = "qcompiler.pipelines"
"""Entry-point group of packages that hold pipelines as `*.yaml`: `name = "package"`."""

READERS = "qcompiler.readers"
"""Entry-point group of functions that read pipelines in other tools' words: `name = "package.module:function"`."""

NESTED = "pipeline"
"""Where the name of a pass may stand, this word stands for a pipeline inside a pipeline."""


def _points(group: str) -> EntryPoints:
    return _points_on(tuple(sys.path), group)


@cache
def _points_on(path: tuple[str, ...], group: str) -> EntryPoints:
    """The entry points of one group: to look into every distribution on the path takes milliseconds, and is done once.

    `path` is `sys.path`, where `entry_points` looks.
    """
    return entry_points(group=group)


def pass_names() -> tuple[str, ...]:
    """The name of every installed pass, sorted. None is imported."""
    return tuple(sorted({point.name for point in _points(PASSES)}))


def pass_classes() -> dict[str, type[Pass]]:
    """Every installed pass by name. Raises `ConfigError` as `pass_class` does."""
    return {name: pass_class(name) for name in pass_names()}


def pass_class(name: str) -> type[Pass]:
    """The pass of this name; no other is imported.

    Raises `ConfigError` with near names where there is none, where two packages claim the name, and where what the
    entry point gives is no pass.
    """
    loaded = {id(cls): cls for cls in (_load(point) for point in _points(PASSES) if point.name == name)}
    if not loaded:
        known = pass_names()
        raise ConfigError(f"unknown pass {name!r}{did_you_mean(name, known)}", hint=f"passes: {', '.join(known)}")
    if len(loaded) > 1:
        claims = " and ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in loaded.values())
        raise ConfigError(f"two packages provide a pass {name!r}: {claims}", hint="uninstall one of them")
    return next(iter(loaded.values()))


def _load(point: EntryPoint) -> type[Pass]:
    who = f"pass {point.name!r} ({point.value})"
    try:
        cls = point.load()
    except Exception as error:  # importing someone's package can fail in every way
        raise ConfigError(
            f"{who} does not load: {type(error).__name__}: {error}",
            hint="repair or uninstall the package that provides it",
        ) from error
    found = check_pass_class(cls, who)
    if found.name != point.name:
        raise ConfigError(
            f"{who}: its `name` is {found.name!r}, and must be the entry point's",
            hint="name the class and its entry point alike",
        )
    return found


def providers(classes: Iterable[type[Pass]]) -> dict[str, str]:
    """Versions of the distributions that provide these passes; of a module of no distribution, `unknown`."""
    homes_of: dict[Distribution, None] = {}
    homeless: set[str] = set()
    for cls in dict.fromkeys(classes):
        named = (point for point in _points(PASSES) if point.name == cls.name)
        point = next((point for point in named if point.dist and _load(point) is cls), None)
        if point is not None and point.dist is not None:
            homes_of[point.dist] = None
        else:
            homeless.add(cls.__module__.partition(".")[0])
    found = {distribution.name: distribution.version for distribution in homes_of}
    homes = packages_distributions() if homeless else {}
    for module in sorted(homeless):
        found |= {name: version(name) for name in homes.get(module, ())} or {module: "unknown"}
    return found


def check_pass_class(cls: object, who: str) -> type[Pass]:
    """`cls`, if it is a pass that can be used: every pass comes through here. Raises `ConfigError` about `who`."""
    from qcompiler.ir.graph import Stage
    from qcompiler.pipeline.base import GraphPass, StreamingPass

    if not (isinstance(cls, type) and issubclass(cls, (GraphPass, StreamingPass))):
        raise ConfigError(
            f"{who} is not a subclass of GraphPass or StreamingPass", hint="derive the class from one of the two"
        )
    if inspect.isabstract(cls):
        raise ConfigError(
            f"{who} does not implement {', '.join(sorted(cls.__abstractmethods__))}", hint="define it in the class"
        )
    params = vars(cls).get("__dataclass_params__")  # its own: fields of a subclass without the decorator are lost
    if not dataclasses.is_dataclass(cls) or params is None or not params.frozen:
        raise ConfigError(f"{who} is not a frozen dataclass", hint="decorate it: @dataclass(frozen=True, kw_only=True)")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or name == NESTED:
        raise ConfigError(
            f"{who}: its `name` is {name!r}: it must be a word, and not {NESTED!r}",
            hint='name it in the class: name: ClassVar[str] = "my-pass"',
        )
    requires, ensures = getattr(cls, "requires", None), cls.ensures
    if not isinstance(requires, frozenset) or not requires or not all(isinstance(stage, Stage) for stage in requires):
        raise ConfigError(f"{who} does not say which stages it `requires`", hint="e.g. frozenset({Stage.ANNOTATED})")
    if ensures is not None and not isinstance(ensures, Stage):
        raise ConfigError(
            f"{who}: what it `ensures` is a Stage or None, not {ensures!r}",
            hint="e.g. Stage.ANNOTATED, or leave it out",
        )
    try:
        TypeAdapter(cls).rebuild(raise_errors=True)
    except (PydanticUserError, NameError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(
            f"{who}: the types of its options cannot be checked: {first}",
            hint="give options plain types, imported at run time and not only under TYPE_CHECKING",
        ) from error
    return cls


class Reader(Protocol):
    """Reads what another tool calls a pipeline."""

    def __call__(self, data: Any, place: Place) -> dict[str, Any] | None:
        """A pipeline as plain data in our words; None for data that is not in the tool's.

        `place` is where the data stands. Raises `ConfigError` for what cannot be done as it was asked for.
        """


def readers() -> Iterator[Reader]:
    """Every installed reader. Raises `ConfigError` for one that does not load."""
    for point in sorted(_points(READERS)):
        try:
            yield point.load()
        except Exception as error:  # importing someone's package can fail in every way
            raise ConfigError(
                f"reader {point.name!r} ({point.value}) does not load: {type(error).__name__}: {error}",
                hint="repair or uninstall the package that provides it",
            ) from error


def packaged_pipelines() -> dict[str, str]:
    """The text of every packaged pipeline, by name. Raises `ConfigError` where two packages claim one name."""
    found: dict[str, tuple[str, str]] = {}
    for package in dict.fromkeys(point.value for point in _points(PIPELINES)):
        try:
            resources = [entry for entry in files(package).iterdir() if entry.name.endswith(".yaml")]
        except Exception as error:
            raise ConfigError(
                f"the pipelines of package {package} cannot be read: {error}", hint="repair or uninstall that package"
            ) from error
        for resource in resources:
            name = resource.name.removesuffix(".yaml")
            if name in found:
                raise ConfigError(
                    f"packages {found[name][0]} and {package} both provide a pipeline {name!r}",
                    hint="uninstall one of them",
                )
            found[name] = (package, resource.read_text(encoding="utf-8"))
    return {name: found[name][1] for name in sorted(found)}
