"""Which of several groups of targets means a leaf, and who disagrees about it.

vLLM reads groups in order; compressed-tensors sorts their targets.

Targets are those of `quantization_config`: a module's class, its exact name, or `re:` and an expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from qcompiler.emit.matchers import transformers_matched_target, transformers_order
from qcompiler.emit.patterns import TargetList
from qcompiler.errors import ConfigError
from qcompiler.expressions import REGEX_PREFIX, Pattern
from qcompiler.ir.annotations import Leaf, LeafKind


def _compiles(target: str) -> str:
    try:
        if target.startswith(REGEX_PREFIX):
            Pattern(target)
    except ConfigError as error:  # as a ValueError, pydantic adds where it was written
        raise ValueError(error.message) from None
    return target


TargetText = Annotated[str, AfterValidator(_compiles)]
"""A module's class, its exact name, or `re:` and an expression that is matched from the start of its name."""


@dataclass(frozen=True, slots=True)
class Meant:
    """A group, by its index, and the target of it that means a leaf."""

    group: int
    target: str


@dataclass(frozen=True, slots=True)
class Claims:
    """The group that decides on a leaf, the others that mean it as closely, and the one that compressed-tensors takes.

    vLLM takes the first that names the module, and only then looks at classes; so do all loaders, and a class is no
    rival of a name. compressed-tensors sorts names (exact ones, then expressions, each alphabetically).
    """

    first: Meant
    others: tuple[Meant, ...]
    library: Meant


class TargetGroups:
    """Groups of targets, in the order in which they are written."""

    def __init__(self, groups: Sequence[Sequence[str]]) -> None:
        self._groups = [TargetList(targets) for targets in groups]
        # The libraries build a map of all targets: one that is repeated belongs to the last group that has it.
        self._last = {target: index for index, targets in enumerate(groups) for target in targets}
        self._order = transformers_order(self._last)

    def claims(self, leaf: Leaf) -> Claims | None:
        """Who decides on a leaf; None where no target means it. Raises `ConfigError` for a regex that does not end."""
        named = [Meant(i, found) for i, group in enumerate(self._groups) if (found := group.first(leaf.path))]
        classed = [Meant(i, found) for i, group in enumerate(self._groups) if (found := _by_class(group, leaf))]
        meant = named or classed
        if not meant:
            return None
        taken = transformers_matched_target(leaf.path, _classes(leaf), self._order)
        assert taken is not None
        return Claims(meant[0], tuple(meant[1:]), Meant(self._last[taken], taken))


def first_target(targets: TargetList, leaf: Leaf) -> str | None:
    """The first target that means a leaf: by name, else by class."""
    return targets.first(leaf.path) or _by_class(targets, leaf)


def _by_class(targets: TargetList, leaf: Leaf) -> str | None:
    return next((target for target in targets.targets if target in _classes(leaf)), None)


def _classes(leaf: Leaf) -> tuple[str, ...]:
    """Its class, and `Linear` for what the libraries make or take for one: a subclass, or a block of experts."""
    linear = ("Linear",) if leaf.kind in (LeafKind.LINEAR, LeafKind.EXPERTS) else ()
    return tuple(dict.fromkeys((leaf.class_name, *linear)))
