"""A captured model: its fx graph, the model it came from (on the meta device), and how far it has been compiled."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Self

import torch.fx
from torch import Tensor
from transformers import PreTrainedModel

from qcompiler.errors import RuleError
from qcompiler.ir.annotations import Leaf, Role, get
from qcompiler.ir.fx import Node
from qcompiler.scheme import KVCacheSpec


class Stage(IntEnum):
    """How far a graph has come. Each stage has a spec in `qcompiler.ir.spec`."""

    CAPTURED = 0
    ANNOTATED = 1
    OBSERVED = 2
    CALIBRATED = 3
    LOWERED = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Partition:
    """Consecutive nodes that run together: what comes before the layers, each decoder layer, what comes after.

    `reads` are values from earlier partitions; `writes` are values that later ones (or the caller) read.
    """

    name: str
    layer: int | None
    nodes: tuple[Node, ...]
    reads: tuple[Node, ...]
    writes: tuple[Node, ...]


@dataclass(slots=True)
class Graph:
    """The unit that passes work on.

    `constants` are tensors that the forward pass made itself; `buffers` are those that the checkpoint does not hold
    (rotary frequencies). `max_sequence_length` bounds the sequences for which the graph is the model, None: no bound.
    `like` maps the path of each decoder layer to that of the layer whose trace it shares. `kv_cache` is what the
    key/value cache becomes, decided for the whole model. `loaders` are those that must read the checkpoint's config
    alike, as `legalize` found; None: all that are known.
    """

    fx: torch.fx.Graph
    model: PreTrainedModel
    constants: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    max_sequence_length: int | None = None
    kv_cache: KVCacheSpec | None = None
    like: dict[str, str] = field(default_factory=dict)
    loaders: tuple[str, ...] | None = None
    stage: Stage = Stage.CAPTURED

    @property
    def nodes(self) -> list[Node]:
        return list(self.fx.nodes)

    @property
    def input(self) -> Node:
        """The placeholder of `input_ids` [B, S]."""
        node: Node = next(node for node in self.fx.nodes if node.op == "placeholder")
        return node

    @property
    def output(self) -> Node:
        """The node whose value is the logits."""
        node: Node = next(node for node in self.fx.nodes if node.op == "output")
        return node.all_input_nodes[0]

    @property
    def layer_count(self) -> int:
        """How many decoder layers there are."""
        layers = [role.layer for node in self.fx.nodes if (role := get(node, Role)) and role.layer is not None]
        return 1 + max(layers, default=-1)

    def copy(self) -> Self:
        """The same graph of the same model, for passes to work on: what they do to it is not done to this one."""
        return replace(
            self,
            fx=deepcopy(self.fx),
            constants=dict(self.constants),
            buffers=dict(self.buffers),
            like=dict(self.like),
        )

    def quantize_cache(self, spec: KVCacheSpec, *, by: str) -> None:
        """Decide what the key/value cache becomes. Raises `RuleError` where an earlier pass decided otherwise."""
        if self.kv_cache not in (None, spec):
            raise RuleError(
                f"{by}: kv_cache asks for one scale per {spec.strategy}, and an earlier pass for one per "
                f"{self.kv_cache.strategy}",
                hint="say kv_cache once",
            )
        self.kv_cache = spec

    def leaves(self) -> Iterator[tuple[Node, Leaf]]:
        """Every raised leaf with what it is, in the order in which they run."""
        for node in self.fx.nodes:
            leaf = get(node, Leaf)
            if leaf is not None:
                yield node, leaf

    def linears(self) -> Iterator[tuple[Node, Leaf]]:
        """Every linear (Conv1D too) with what it is, in the order in which they run."""
        return ((node, leaf) for node, leaf in self.leaves() if leaf.is_linear)
