"""Activations that cross partition borders, batch by batch, on the host; and running batches through a partition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qcompiler.data.batches import TokenBatch
from qcompiler.ir.annotations import scheme_of
from qcompiler.ir.fx import Node, bytes_at, is_op, symbols, value
from qcompiler.ir.graph import Graph, Partition
from qcompiler.ir.ops import OPS
from qcompiler.runtime.attention import attend_causally, is_causal, mask_of
from qcompiler.runtime.evaluate import Handler, evaluate
from qcompiler.runtime.shelf import Shelf

Handlers = Callable[[TokenBatch], Mapping[Any, Handler]]
"""What evaluates nodes in place of their targets, for one batch."""


def always(handlers: Mapping[Any, Handler]) -> Handlers:
    """The same handlers for every batch."""
    return lambda batch: handlers


def depends_on_tokens(graph: Graph) -> set[Node]:
    """Nodes whose values depend on which tokens came in, not only on how many (masks and rotary tables do not).

    So does, for all we say, what is observed or rounded: the handlers that do it come with a batch.
    """
    found = {graph.input}
    for node in graph.nodes:
        handled = node.target in OPS.values() or scheme_of(node) is not None
        if handled or (not is_op(node, "aten.sym_size") and any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def widths(graph: Graph, parts: Sequence[Partition]) -> list[Counter[int]]:
    """Bytes per token of what crosses the end of each part, of values that depend on the tokens, by the value's."""
    tokens = depends_on_tokens(graph)
    last_reader = {node: index for index, part in enumerate(parts) for node in part.reads}
    found: list[Counter[int]] = [Counter() for _ in parts]
    for first, part in enumerate(parts):
        for node in part.writes:
            tensor = value(node)
            if node in tokens and isinstance(tensor, Tensor):
                size = prod(side for side in tensor.shape if isinstance(side, int)) * tensor.dtype.itemsize
                for index in range(first, last_reader.get(node, first)):
                    found[index][size] += size
    return found


def bytes_by_shape(graph: Graph, parts: Sequence[Partition], shapes: Collection[torch.Size]) -> int:
    """Bytes of what crosses an end of `parts` once for each shape of a batch [B, S]: masks, and angles of positions."""
    tokens = depends_on_tokens(graph)
    read = {node for part in parts for node in part.reads}
    crossing = [node for part in parts for node in part.writes if node in read and node not in tokens]
    names = symbols(graph.input)
    return sum(bytes_at(node, dict(zip(names, shape, strict=True))) for node in crossing for shape in shapes)


class Stream:
    """The batches on their way through the partitions.

    Values that depend on the tokens are kept for every batch; those that depend on the shape alone are computed and
    kept once per shape. Everything waits on the host, in the dtype that the graph gives it: on the `shelf`, where there
    is one, else in memory. Attention whose mask is of the shape alone, and the plain causal one, is computed without
    it; such a mask does not wait.
    """

    def __init__(
        self,
        graph: Graph,
        parts: Sequence[Partition],
        batches: Sequence[TokenBatch],
        device: torch.device,
        shelf: Shelf | None = None,
    ) -> None:
        self._graph = graph
        self._shelf = shelf
        self._batches = batches
        self.device = device
        self._tokens = depends_on_tokens(graph)
        self._last_reader = {node: index for index, part in enumerate(parts) for node in part.reads}
        self._last_reader[graph.output] = len(parts)  # the caller reads it
        self._index = {part.name: index for index, part in enumerate(parts)}
        self._values: list[dict[Node, Any]] = [{graph.input: batch.input_ids} for batch in batches]
        self._shapes: dict[torch.Size, list[int]] = {}  # the batches of each
        for number, batch in enumerate(batches):
            self._shapes.setdefault(batch.input_ids.shape, []).append(number)
        self._shared: dict[torch.Size, dict[Node, Any]] = {shape: {} for shape in self._shapes}
        self._causal: dict[tuple[torch.Size, Node], bool] = {}  # masks that were looked at

    @property
    def model(self) -> PreTrainedModel:
        """The model, on the meta device."""
        return self._graph.model

    def run(
        self, part: Partition, nodes: Sequence[Node], weights: Mapping[str, Tensor], handlers: Handlers, *, keep: bool
    ) -> None:
        """Run every batch through `nodes`, up to the end of `part`; `keep` what later parts read, and nothing else."""
        index = self._index[part.name]
        later = [node for node in nodes if self._last_reader.get(node, -1) > index] if keep else []
        by_tokens = [node for node in nodes if node in self._tokens]
        by_shape = [node for node in nodes if node not in self._tokens]
        kept = [node for node in later if node in self._tokens]
        read = {source for node in nodes for source in node.all_input_nodes}
        wanted = {node for node in by_shape if any(user in self._tokens for user in node.users)}
        wanted |= {node for node in later if node not in self._tokens}
        # One shape after the other: masks grow with the square of the length.
        for shape, numbers in self._shapes.items():
            shared = self._shared[shape]
            values = {node: self._fetch(waiting) for node, waiting in shared.items() if node in read}
            values[self._graph.input] = self._batches[numbers[0]].input_ids
            values |= self._evaluate(by_shape, values, weights, wanted, {})
            attention = self._causal_attention(by_tokens, shape, values)
            for number in numbers:
                batch, own = self._batches[number], self._values[number]
                mine = {node: self._fetch(waiting) for node, waiting in own.items() if node in read}
                special = {**attention, **handlers(batch)}
                found = self._evaluate(by_tokens, {**values, **mine}, weights, kept, special)
                own |= {node: self._keep(result) for node, result in found.items()}
                if keep:
                    self._forget(own, index)
            if keep:
                waits = {node: self._without_mask(node, shape, values[node]) for node in later if node in wanted}
                shared |= {node: self._keep(result) for node, result in waits.items()}
                self._forget(shared, index)

    def _causal_attention(
        self, nodes: Iterable[Node], shape: torch.Size, values: Mapping[Node, Any]
    ) -> dict[Node, Handler]:
        """What evaluates those of `nodes` that attend under the plain causal mask."""
        masks = {node: mask for node in nodes if (mask := mask_of(node)) is not None and mask in values}
        return {node: attend_causally for node, mask in masks.items() if self._is_causal(mask, shape, values[mask])}

    def _is_causal(self, mask: Node, shape: torch.Size, found: Any) -> bool:
        """Whether a mask is the causal one; each is looked at once."""
        if (shape, mask) not in self._causal:
            self._causal[shape, mask] = is_causal(found)
        return self._causal[shape, mask]

    def _without_mask(self, node: Node, shape: torch.Size, found: Any) -> Any:
        """A value that is to wait; of a causal mask that only attention reads, its shape alone."""
        if all(mask_of(user) is node for user in node.users) and self._is_causal(node, shape, found):
            return found.new_ones(()).expand(found.shape)  # which is all of a mask of one token
        return found

    def _forget(self, values: dict[Node, Any], index: int) -> None:
        for node in [n for n in values if self._last_reader.get(n, -1) <= index]:
            gone = values.pop(node)
            if self._shelf is not None:
                self._shelf.drop(gone)

    def _keep(self, value: Any) -> Any:
        return self._shelf.put(value) if self._shelf is not None else value

    def _fetch(self, value: Any) -> Any:
        return self._shelf.get(value) if self._shelf is not None else value

    def _evaluate(
        self,
        nodes: Iterable[Node],
        values: dict[Node, Any],
        weights: Mapping[str, Tensor],
        keep: Iterable[Node],
        handlers: Mapping[Any, Handler],
    ) -> dict[Node, Any]:
        here = {node: _to(value, self.device) for node, value in values.items()}
        with torch.no_grad():
            kept = evaluate(
                nodes,
                here,
                root=self._graph.model,
                tensors=weights,
                device=self.device,
                keep=keep,
                handlers=handlers,
            )
        return {node: _to(value, torch.device("cpu")) for node, value in kept.items()}

    def outputs(self) -> list[Tensor]:
        """The logits of every batch, once the last partition was run with `keep`."""
        return [self._fetch(values[self._graph.output]) for values in self._values]


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
