"""Target patterns of `quantization_config`: an exact name, a class name, or `re:` and a regular expression."""

from __future__ import annotations

from collections.abc import Iterable

from qcompiler.expressions import REGEX_PREFIX, Engine, Pattern


class TargetList:
    """Targets in order, answering "which is the first that matches?" without a scan over exact names.

    engine: as whose the expressions are read; None: all loaders' alike, else `PatternError` is raised.
    """

    __slots__ = ("_exact", "_patterns", "_regexes", "targets")

    def __init__(self, targets: Iterable[str], engine: Engine | None = None) -> None:
        self.targets = tuple(targets)
        self._exact: dict[str, int] = {}
        self._regexes: list[tuple[int, Pattern]] = []
        for position, target in enumerate(self.targets):
            if target.startswith(REGEX_PREFIX):
                self._regexes.append((position, Pattern(target, engine)))
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
