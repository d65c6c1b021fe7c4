"""What Python callers hand over, checked before anything is done with it: the command line checks its own words."""

from __future__ import annotations

from reprlib import repr as brief
from typing import Any, NoReturn

from qcompiler.errors import ConfigError


def check_type(name: str, value: object, kinds: Any, wanted: str) -> None:
    """Raise `ConfigError` where the argument `name` is of none of `kinds` (as `isinstance` takes them)."""
    if not isinstance(value, kinds):
        _refuse(name, value, wanted)


def check_callable(name: str, value: object) -> None:
    """Raise `ConfigError` where the argument `name` is neither None nor a function."""
    if value is not None and not callable(value):
        _refuse(name, value, "a function, or None")


def check_rows(name: str, value: object, wanted: str) -> None:
    """Raise `ConfigError` where nothing can be taken from the argument `name`, by iterating or by index."""
    if not (hasattr(value, "__iter__") or hasattr(value, "__getitem__")):
        _refuse(name, value, wanted)


def check_count(name: str, value: object, *, least: int) -> None:
    """Raise `ConfigError` where the argument `name` is no whole number, or less than `least`."""
    wanted = f"a whole number, at least {least}"
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(name, value, wanted)
    if value < least:
        raise ConfigError(f"{name}={value} is too small", hint=f"give {wanted}")


def _refuse(name: str, value: object, wanted: str) -> NoReturn:
    raise ConfigError(f"{name}={brief(value)} is of type {type(value).__name__}", hint=f"give {wanted}")
