"""Regular expressions of strangers, as rules and checkpoints write them: `re:` and what `re.match` takes.

vLLM matches them with the package `regex`; compressed-tensors, Transformers, llm-compressor and SGLang with Python's
`re`. The one reads more than the other, and a little differently.

Loaders run these with no limit. Here every expression runs under a timeout: one that backtracks forever must be an
error with a name, not a hang. `re` knows no timeout, so `regex` also matches for it, what it alone reads written out.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from time import thread_time
from typing import Any, Literal

import regex

from qcompiler.errors import ConfigError

Engine = Literal["re", "regex"]
"""Whose reading of an expression counts."""

REGEX_PREFIX = "re:"
TIMEOUT_SECONDS = 1.0
_SLOW_SECONDS = 0.005  # a thousand times what an expression takes that does not backtrack
_MAX_REPEATS = 10_000
_MAX_LENGTH = 10_000  # `re` takes seconds to compile as much of what it is slowest at
_COMPILE_SECONDS = 10.0
_REPEAT = re.compile(r"\{(?:\d*,)?(\d+)\}")
_OF_REGEX = re.compile(r"\\(?:N\{[^}]{0,100}\}|.)|\[:(?=[^\]]{0,100}:\])|\{(?!\d*,?\d*\})", re.DOTALL)
"""What only `regex` reads where `re` also compiles: `[[:alpha:]]`, and braces that allow errors. And any escape."""


class PatternError(ConfigError):
    """An expression that no loader can compile, or that they read differently."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """An expression as both engines read it, ready for `regex`. refused: why an engine does not compile it."""

    compiled: Mapping[Engine, Any]
    refused: Mapping[Engine, str]
    alike: bool


def refusals(target: str) -> Mapping[Engine, str]:
    """Why an engine does not compile a `re:` expression; empty where both do.

    Raises `ConfigError` where compiling it could take forever.
    """
    return _read(target).refused


def read_alike(target: str) -> bool:
    """Whether both engines read a `re:` expression as the same. Raises as `refusals`."""
    return _read(target).alike


def compile_together(targets: Iterable[str]) -> None:
    """Compile `re:` expressions, for whoever matches them later. Raises `ConfigError` where that takes too long."""
    start = thread_time()
    for target in targets:
        _read(target)
        if thread_time() - start > _COMPILE_SECONDS:
            raise ConfigError(
                f"expressions up to {target[:60]!r} take longer than {_COMPILE_SECONDS:g} s to compile",
                hint="do not trust who wrote them; or name the modules one by one",
            )


@lru_cache(maxsize=4096)
def _read(target: str) -> _Reading:
    if len(target) > _MAX_LENGTH:
        raise ConfigError(
            f"target {target[:60]!r}... has {len(target)} characters; expressions of up to {_MAX_LENGTH} are read",
            hint="name the modules one by one, or write several expressions",
        )
    # Compiling writes counted repeats out, nested ones multiplied, and knows no timeout.
    if math.prod(int(count[:9]) or 1 for count in _REPEAT.findall(target)) > _MAX_REPEATS:
        raise ConfigError(
            f"target {target!r} repeats parts of itself more than {_MAX_REPEATS} times",
            hint="a module's name is short: use *, + or a small count",
        )
    text = target.removeprefix(REGEX_PREFIX)
    plain = _OF_REGEX.sub(_written_out, text)
    compiled: dict[Engine, Any] = {}
    refused: dict[Engine, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sets may be nested one day
        try:
            re.compile(text)
            compiled["re"] = regex.compile(plain)
        except _ERRORS as error:
            refused["re"] = _why(error)
        try:
            compiled["regex"] = regex.compile(text)
        except _ERRORS as error:
            refused["regex"] = _why(error)
    return _Reading(compiled, refused, alike=not refused and plain == text)


_ERRORS = (re.error, regex.error, RecursionError, OverflowError)


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, (re.error, regex.error)) else type(error).__name__


def _written_out(found: re.Match[str]) -> str:
    token = found[0]
    return {"[:": r"[\:", "{": r"\{"}.get(token, token)


class Pattern:
    """One compiled `re:` expression, as `engine` reads it, or where that refuses it, the other; None: as both do.

    Raises `PatternError` where no engine reads it, or for None, where one does not or they differ; and `ConfigError`
    where it is endless.
    """

    __slots__ = ("_compiled", "_spent", "target")

    def __init__(self, target: str, engine: Engine | None = None) -> None:
        self.target = target
        self._spent = 0.0
        reading = _read(target)
        if not reading.compiled or (engine is None and reading.refused):
            raise _unreadable(target, reading.refused)
        if engine is None and not reading.alike:
            raise PatternError(
                f"target {target[:200]!r} means one thing to vLLM (regex), another to the rest (Python's re)",
                hint="write no [[:class:]] and no braces but for counts: escape them where they are meant literally",
            )
        self._compiled = reading.compiled.get(engine or "regex") or next(iter(reading.compiled.values()))

    def matches(self, value: str) -> bool:
        """Whether the expression matches at the start of `value` (as `re.match`).

        Raises `ConfigError` on a timeout. All slow matches of an expression share it: half a second for each name of a
        large model would be hours.
        """
        start = thread_time()
        try:
            found = self._compiled.match(value, timeout=max(TIMEOUT_SECONDS - self._spent, _SLOW_SECONDS))
        except TimeoutError:
            raise ConfigError(
                f"target {self.target!r} did not finish on {value!r} within {TIMEOUT_SECONDS:g} s: it backtracks "
                "exponentially",
                hint="replace nested repetition such as (a+)+ with a plain one, or name the modules",
            ) from None
        spent = thread_time() - start
        if spent > _SLOW_SECONDS:
            self._spent += spent
        return found is not None


def _unreadable(target: str, refused: Mapping[Engine, str]) -> PatternError:
    everyone = len(refused) == 2
    ((engine, why), *_) = refused.items()
    whose = "" if everyone else " to Python's re, which all loaders but vLLM use" if engine == "re" else " to vLLM"
    return PatternError(
        f"target {target[:200]!r} is not a regular expression{whose}: {why}",
        hint=f"targets that start with {REGEX_PREFIX!r} are regular expressions; escape dots and brackets",
    )
