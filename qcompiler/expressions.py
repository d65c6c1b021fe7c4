"""Regular expressions of strangers, as rules and checkpoints write them: `re:` and what `re.match` takes.

Loaders run these with no limit. Here every expression runs under a timeout: one that backtracks forever must be an
error with a name, not a hang.
"""

from __future__ import annotations

import math
import re
from time import thread_time

import regex

from qcompiler.errors import ConfigError

REGEX_PREFIX = "re:"
TIMEOUT_SECONDS = 1.0
_SLOW_SECONDS = 0.005  # a thousand times what an expression takes that does not backtrack
_MAX_REPEATS = 10_000
_REPEAT = re.compile(r"\{(?:\d*,)?(\d+)\}")


class PatternError(ConfigError):
    """An expression that no loader can compile."""


class Pattern:
    """One compiled `re:` expression. Raises `PatternError` where it is invalid, `ConfigError` where it is endless."""

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
            raise _unreadable(target, str(error)) from None
        except (RecursionError, OverflowError) as error:
            raise _unreadable(target, type(error).__name__) from None

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


def _unreadable(target: str, why: str) -> PatternError:
    return PatternError(
        f"target {target[:200]!r} is not a regular expression: {why}",
        hint=f"targets that start with {REGEX_PREFIX!r} are regular expressions; escape dots and brackets",
    )
