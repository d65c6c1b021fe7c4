"""For what runtime a recipe is checked: it names none, and the tool that runs it checks for none."""

from __future__ import annotations

from collections.abc import Sequence

from qcompiler.emit.sites import Site
from qcompiler.ir.annotations import Structure
from qcompiler.scheme import KVCacheSpec, Scheme
from qcompiler.targets import check, load_target

_TRIED = ("vllm-sm90", "vllm-sm100", "transformers")
_WIDE = 1 << 14
"""Features of a linear that every group and every kernel divides."""


def fitting_target(schemes: Sequence[Scheme], cache: KVCacheSpec | None) -> str | None:
    """The first target that takes these numbers; None where it is the one that is assumed, or where none does."""
    sites = [
        Site(f"layer{index}", _WIDE, _WIDE, scheme=scheme, structure=Structure.MLP_OUTPUT)
        for index, scheme in enumerate(schemes)
    ]
    found = next((name for name in _TRIED if not check(load_target(name), sites, kv_cache=cache)), None)
    return None if found == _TRIED[0] else found
