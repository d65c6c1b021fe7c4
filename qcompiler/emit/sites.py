"""Sites: the quantizable linears of a model, as the loaders of its checkpoint will see them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qcompiler.ir.annotations import Structure
from qcompiler.scheme import Scheme

FusedNames = Mapping[str, Sequence[Sequence[str]]]
"""Fused name -> the lists of shard names it can stand for (model classes of one runtime differ), in shard order."""

EXPERT_NAME = re.compile(r"(?P<block>.+\.experts)\.(?P<index>\d+)\.(?P<projection>[^.]+)")
"""How checkpoints name one projection of one expert: `model.layers.0.mlp.experts.7.gate_proj`."""

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""What runtimes call the projections of a gated expert as they look for their schemes, whatever the model says.

No mapping of Transformers has them: it knows what a checkpoint calls them (Mixtral's `w1`, `w3`, `w2`; see
`qcompiler.lowering.sites.disk_sites`), and SGLang asks for these three even so.
"""


@dataclass(frozen=True, slots=True)
class Site:
    """One linear. `scheme` None: it stays dense. `fusion_group` is the compiler's id for linears that fuse."""

    name: str
    out_features: int
    in_features: int
    scheme: Scheme | None = None
    class_name: str = "Linear"
    has_bias: bool = False
    fusion_group: str | None = None
    structure: Structure | None = None
    kind: Literal["linear", "conv1d", "experts"] = "linear"

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """The path up to and without the last dot; empty for a top-level module."""
        return self.name.rpartition(".")[0]

    @property
    def expert_block(self) -> str | None:
        """The module that holds this expert (`model.layers.0.mlp.experts`), or None for any other linear."""
        match = EXPERT_NAME.fullmatch(self.name) if self.kind == "experts" else None
        return match["block"] if match else None


@dataclass(frozen=True, slots=True)
class RuntimeModule:
    """One module of a serving runtime and the sites it holds: a linear alone, fused shards, or a block of experts.

    `shards` is what the runtime expands `name` to, in its order; empty when it does not fuse this module.
    """

    name: str
    sites: tuple[Site, ...]
    shards: tuple[str, ...] = ()
    is_expert_block: bool = False


def runtime_modules(sites: Iterable[Site], fused: FusedNames) -> list[RuntimeModule]:
    """The modules a runtime with these fused names builds for `sites`, in order of first appearance.

    A fused module forms where one parent holds at least two shards of one of its lists; the longest list wins. A
    parent that already has a module of the fused name (Phi-3's `qkv_proj`) is not fused again.
    """
    sites = list(sites)
    by_parent: dict[str, dict[str, Site]] = {}
    blocks: dict[str, list[Site]] = {}
    for site in sites:
        if site.expert_block is not None:
            blocks.setdefault(site.expert_block, []).append(site)
        else:
            by_parent.setdefault(site.parent, {})[site.leaf] = site

    module_of: dict[str, RuntimeModule] = {}
    for parent, leaves in by_parent.items():
        for fused_name, shards in _fusions(leaves, fused):
            members = tuple(leaves[shard] for shard in shards if shard in leaves)
            name = f"{parent}.{fused_name}" if parent else fused_name
            module_of |= dict.fromkeys((site.name for site in members), RuntimeModule(name, members, shards))
    for block, members_of_block in blocks.items():
        module = RuntimeModule(block, tuple(members_of_block), is_expert_block=True)
        module_of |= {site.name: module for site in members_of_block}
    for site in sites:
        module_of.setdefault(site.name, RuntimeModule(site.name, (site,)))
    return list({id(module_of[site.name]): module_of[site.name] for site in sites}.values())


def _fusions(leaves: Mapping[str, Site], fused: FusedNames) -> list[tuple[str, tuple[str, ...]]]:
    candidates = [
        (fused_name, tuple(shards))
        for fused_name, expansions in fused.items()
        if fused_name not in leaves
        for shards in expansions
        if sum(shard in leaves for shard in shards) >= 2
    ]
    candidates.sort(key=lambda c: (all(s in leaves for s in c[1]), len(c[1])), reverse=True)
    chosen: list[tuple[str, tuple[str, ...]]] = []
    for fused_name, shards in candidates:
        if not any(set(shards) & set(taken) for _, taken in chosen):
            chosen.append((fused_name, shards))
    return chosen
