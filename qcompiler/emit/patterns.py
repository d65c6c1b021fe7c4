"""Target patterns of `quantization_config`: an exact name, a class name, or `re:` and a regular expression.

Loaders run these with `re.match` and no limit. Here every expression runs under a timeout: checkpoints come from
strangers, and an expression that backtracks forever must be an error with a name, not a hang.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from time import thread_time

import regex

from qcompiler.errors import ConfigError

REGEX_PREFIX = "re:"
TIMEOUT_SECONDS = 1.0
_SLOW_SECONDS = 0.005  # a thousand times what an expression takes that does not backtrack
_MAX_REPEATS = 10_000
_REPEAT = re.compile(r"\{(?:\d*,)?(\d+)\}")


class Pattern:
    """One compiled `re:` target. Raises `ConfigError` where the expression is invalid."""

    __slots__ = ("_compiled", "_spent", "target")

    def __init__(self, target: str) -> None:
        self.target = target
        self._spent = 0.0
        # Compiling writes counted repeats out, nested ones multiplied, and knows no timeout.
        if math.prod(int(count[:9]) or 1 for count in _REPEAT.findall(target)) > _MAX_REPEATS:
            raise ConfigError(
                f"target {target!r} repeats parts of itself more than {_MAX_REPEATS} times",
                hint="a module's name is short: use *, + or a small count",
            )
        try:
            self._compiled = regex.compile(target.removeprefix(REGEX_PREFIX))
        except regex.error as error:
            raise ConfigError(
                f"target {target!r} is not a regular expression: {error}",
                hint=f"targets that start with {REGEX_PREFIX!r} are regular expressions; escape dots and brackets",
            ) from None

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


class TargetList:
    """Targets in order, answering "which is the first that matches?" without a scan over exact names."""

    __slots__ = ("_exact", "_patterns", "_regexes", "targets")

    def __init__(self, targets: Iterable[str]) -> None:
        self.targets = tuple(targets)
        self._exact: dict[str, int] = {}
        self._regexes: list[tuple[int, Pattern]] = []
        for position, target in enumerate(self.targets):
            if target.startswith(REGEX_PREFIX):
                self._regexes.append((position, Pattern(target)))
            else:
                self._exact.setdefault(target, position)
        self._patterns = dict(self._regexes)

    def first(self, name: str) -> str | None:
        """The first target equal to `name` or whose expression matches it."""
        best = self._exact.get(name, len(self.targets))
        for position, pattern in self._regexes:
            if position > best:
                break
            if pattern.matches(name):
                best = position
                break
        return self.targets[best] if best < len(self.targets) else None

    def first_containing(self, value: str) -> str | None:
        """As `first`, but a plain target matches wherever it is a part of `value`, in any case."""
        folded = value.lower()
        for position, target in enumerate(self.targets):
            pattern = self._patterns.get(position)
            if pattern.matches(value) if pattern else target.lower() in folded:
                return target
        return None

    def first_suffix(self, name: str) -> str | None:
        """As `first`, but a plain target also matches a dotted suffix of `name`."""
        for position, target in enumerate(self.targets):
            pattern = self._patterns.get(position)
            if pattern.matches(name) if pattern else name == target or name.endswith(f".{target}"):
                return target
        return None
