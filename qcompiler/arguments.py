"""What Python callers hand over, checked before anything is done with it: the command line checks its own words."""

from __future__ import annotations

from reprlib import repr as brief
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from qcompiler.errors import ConfigError, did_you_mean


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


def wrong_arguments(error: ValidationError, cls: type[BaseModel]) -> ConfigError:
    """The `ConfigError` for arguments that a model of pydantic does not take: a line for each, by its name."""
    lines = []
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else cls.__name__
        if item["type"] == "extra_forbidden":
            lines.append(f"{name}: {cls.__name__} has no such argument{did_you_mean(name, cls.model_fields)}")
        else:
            words = item["msg"].removeprefix("Value error, ")
            lines.append(f"{name}={brief(item['input'])}: {words[:1].lower()}{words[1:]}")
    return ConfigError("\n".join(dict.fromkeys(lines)), hint=f"{cls.__name__} takes {', '.join(cls.model_fields)}")


def _refuse(name: str, value: object, wanted: str) -> NoReturn:
    raise ConfigError(f"{name}={brief(value)} is of type {type(value).__name__}", hint=f"give {wanted}")
