"""Targets for groups of sites: a few anchored regular expressions where those are exact, names everywhere else.

Every expression ends with `$` and names whole path components: vLLM tries targets on *fused* names first, where an
unanchored `.*up_proj$` takes `gate_up_proj`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from qcompiler.emit.sites import Site

_ANY_EXPERT = r"\d+"
_FOREIGN = object()  # the label of a site in a family that it may not be named by: targets stay disjoint


@dataclass(frozen=True, slots=True)
class _Family:
    """Sites that one expression can cover: equal last components, or the same place in each layer."""

    head: str  # the component before the layer's index; empty: the expression does not look at layers
    layer: str
    tail: str  # an expression

    @property
    def expression(self) -> str:
        return rf"re:.*\.{self.head}\.{self.layer}\.{self.tail}$" if self.head else rf"re:.*\.{self.tail}$"


def compact_targets(sites: Sequence[Site], label_of: Mapping[str, Hashable]) -> dict[Hashable, list[str]]:
    """Label -> targets that together match every site of that label and no other site.

    `label_of` gives every site's name its label (None: no target may match it). Each site takes the shortest
    expression whose sites all carry one label: by leaf, by leaf and parent, by layer number; else its name.
    """
    labels: dict[_Family, set[Hashable]] = defaultdict(set)
    offered_to: list[list[_Family]] = []
    for site in sites:
        covering = _covering(site)
        # Experts always say `experts`: Transformers looks for that word.
        offered = [f for f in covering if r"experts\." in f.tail] if site.expert_block else covering
        offered_to.append(offered)
        for family in covering:
            labels[family].add(label_of[site.name] if family in offered else _FOREIGN)

    targets: dict[Hashable, dict[_Family | str, None]] = defaultdict(dict)
    for site, offered in zip(sites, offered_to, strict=True):
        label = label_of[site.name]
        if label is not None:
            uniform = (family for family in offered if labels[family] == {label})
            targets[label][next(uniform, site.name)] = None
    return {label: _rendered(list(chosen)) for label, chosen in targets.items()}


def exact_targets(sites: Sequence[Site], label_of: Mapping[str, Hashable]) -> dict[Hashable, list[str]]:
    """Label -> the names of its sites."""
    targets: dict[Hashable, list[str]] = defaultdict(list)
    for site in sites:
        if label_of[site.name] is not None:
            targets[label_of[site.name]].append(site.name)
    return dict(targets)


def exact_expression(name: str) -> str:
    """A `re:` target that matches `name` alone, for loaders that read plain names loosely."""
    return f"re:{re.escape(name)}$"


def _covering(site: Site) -> list[_Family]:
    """Every family whose expression matches this site, shortest first."""
    parts = site.name.split(".")
    escaped = [re.escape(part) for part in parts]
    if site.expert_block is not None:
        escaped[-2] = _ANY_EXPERT
    families = [
        _Family("", "", r"\.".join(escaped[-count:])) for count in (1, 2, 3) if _is_suffix(parts, escaped, count)
    ]
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if index is not None and 1 < index < len(parts) - 1:
        families.append(_Family(escaped[index - 1], parts[index], r"\.".join(escaped[index + 1 :])))
    return families


def _is_suffix(parts: Sequence[str], escaped: Sequence[str], count: int) -> bool:
    """Whether the last `count` components are a proper suffix that holds no layer number."""
    return count < len(parts) and not any(part.isdigit() for part in escaped[-count:])


def _rendered(chosen: Sequence[_Family | str]) -> list[str]:
    """Names and expressions, with one expression for all layers that differ only in their number."""
    layers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in chosen:
        if isinstance(item, _Family) and item.head:
            layers[item.head, item.tail].append(item.layer)
    rendered: dict[str, None] = {}
    for item in chosen:
        if isinstance(item, _Family) and item.head:
            numbers = sorted(layers[item.head, item.tail], key=int)
            layer = numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})"
            rendered[_Family(item.head, layer, item.tail).expression] = None
        else:
            rendered[item if isinstance(item, str) else item.expression] = None
    return list(rendered)
