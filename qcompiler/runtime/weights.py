"""The weights of one partition, each read when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from time import perf_counter

import torch
from torch import Tensor

from qcompiler.ir.annotations import Leaf, get
from qcompiler.ir.graph import Graph, Partition
from qcompiler.ir.ops import quantized_linear
from qcompiler.source import ModelSource


class LazyWeights(MutableMapping[str, Tensor]):
    """Parameters, buffers and constants by path, on one device. What nobody asks for is never read.

    A tensor that was read is kept until it is replaced or let go of. `seconds` is the time that reading took.
    """

    def __init__(
        self,
        paths: Iterable[str],
        load: Callable[[list[str]], Mapping[str, Tensor]],
        *,
        own: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        """`own` are tensors that `load` does not have: those that the forward pass made itself, and its buffers."""
        self.seconds = 0.0
        self._load = load
        self._own = own
        self._device = device
        self._held: dict[str, Tensor | None] = dict.fromkeys(paths)

    def __getitem__(self, path: str) -> Tensor:
        held = self._held[path]
        if held is None:
            start = perf_counter()
            value = self._own[path] if path in self._own else self._load([path])[path]
            held = self._held[path] = value.to(self._device)
            self.seconds += perf_counter() - start
        return held

    def __setitem__(self, path: str, value: Tensor) -> None:
        self._held[path] = value

    def release(self, path: str) -> None:
        """Let go of a tensor. Who asks for it again gets it read again, as it was at first."""
        self._held[path] = None

    def __delitem__(self, path: str) -> None:
        del self._held[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def tensor_paths(graph: Graph, part: Partition) -> list[str]:
    """The parameters and buffers that a partition's nodes use, by path, in order of use."""
    paths: dict[str, None] = {}
    for node in part.nodes:
        leaf = get(node, Leaf)
        if node.op == "get_attr":
            paths[str(node.target)] = None
        elif leaf is not None and (node.op == "call_module" or node.target is quantized_linear):
            module = graph.model.get_submodule(leaf.path)
            for name, _ in (*module.named_parameters(), *module.named_buffers()):
                paths[f"{leaf.path}.{name}"] = None
    return list(paths)


def lazy_weights(graph: Graph, part: Partition, source: ModelSource, device: torch.device) -> LazyWeights:
    """Every parameter, buffer and constant that a partition uses, by path, on the device, read when asked for."""
    return LazyWeights(tensor_paths(graph, part), source.load, own=graph.buffers | graph.constants, device=device)
