"""Where a scale can move from a producer to all of its consumers: dividing here and multiplying there changes nothing.

A site is a norm or a linear whose output channels reach only linears, through operations that keep a positive factor
(see `qcompiler.patterns.channels`). AWQ and SmoothQuant choose the factors; `qcompiler.transforms.fold` moves them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompiler.ir.annotations import Leaf, LeafKind, Role, get, need
from qcompiler.ir.fx import Node, ancestors, is_op, last_dim, tensor_arg
from qcompiler.ir.graph import Graph
from qcompiler.ir.partition import partitions
from qcompiler.patterns.cache import cached_tensors
from qcompiler.patterns.channels import CASTS, follow
from qcompiler.patterns.language import NearMiss
from qcompiler.patterns.vocabulary import source
from qcompiler.transforms.norms import Gain, norm_gains

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class RescaleSite:
    """One tensor whose features can be divided by a scale in its producer and multiplied back in all its readers.

    `consumers` are all linears that read `tensor`. `channels` int64 [I]: the producer's output channel that each input
    feature of the consumers grows with; features that share one must have equal scales. `gains` are the producer's
    parameters to divide, `weights` the consumers' [O, I] to multiply, by path. `id` is the consumers' input group.
    `kind` says in words what feeds what.
    """

    id: str
    kind: str
    producer: Node
    consumers: tuple[Node, ...]
    tensor: Node
    channels: Tensor = field(compare=False)
    gains: tuple[Gain, ...]
    weights: tuple[str, ...]

    @property
    def tied(self) -> bool:
        """Whether several features share a channel, as the heads of grouped queries share their values."""
        return bool((torch.bincount(self.channels) > 1).any())


def rescale_sites(graph: Graph) -> tuple[tuple[RescaleSite, ...], tuple[NearMiss, ...]]:
    """Every site of a captured graph, one per tensor, in the order in which their consumers run; and near misses.

    A near miss is anchored at a linear (or a block of experts) whose input cannot be rescaled, and says why for the
    nearest producers of that input. Its parts: there is a producer (1 held), whose channels reach linears alone (2),
    and all their weights may be changed.
    """
    facts = _Facts.of(graph)
    tried = {node: _try(graph, facts, node) for node, leaf in graph.leaves() if leaf.kind in _PRODUCERS}
    found = [attempt for attempt in tried.values() if attempt.site is not None]
    sites: dict[Node, RescaleSite] = {}
    for attempt in sorted(found, key=lambda attempt: attempt.activated):
        assert attempt.site is not None
        sites.setdefault(attempt.site.tensor, attempt.site)  # of a product's factors, the one without an activation
    rescaled = {node for site in sites.values() for node in site.consumers}
    readers = [node for node, leaf in graph.leaves() if leaf.is_linear or leaf.kind is LeafKind.EXPERTS]
    misses = [_miss(node, tried) for node in readers if node not in rescaled]
    return tuple(sorted(sites.values(), key=lambda site: site.consumers[0])), tuple(misses)


_PRODUCERS = (LeafKind.NORM, LeafKind.LINEAR, LeafKind.CONV1D)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What came of a leaf as a producer: a site, or how many parts held and why no more did."""

    site: RescaleSite | None
    why: str
    held: int = 1
    activated: bool = False


def _try(graph: Graph, facts: _Facts, producer: Node) -> _Attempt:
    leaf = need(producer, Leaf)
    if leaf.kind is LeafKind.CONV1D:
        return _Attempt(None, "it is a conv1d, which no loader reads quantized")
    flow = follow(graph, producer)
    why = ", and ".join(flow.held[:_SHOWN])
    if not flow.readers:
        return _Attempt(None, why or "no linear reads it")
    consumers = tuple(sorted(flow.readers))
    first = next((node for node in consumers if need(node, Leaf).is_linear), consumers[0])
    rows = flow.readers[first]
    if not need(first, Leaf).is_linear:
        return _Attempt(None, "only routers read it")
    if any(_tensor(n) is not _tensor(first) or not torch.equal(flow.readers[n], rows) for n in consumers):
        return _Attempt(None, f"its channels reach {_listed(consumers)} as different tensors")
    if not bool(rows.all()):
        return _Attempt(None, f"only some features of what {_listed(consumers)} read grow with it")
    gains = _gains(graph, producer, leaf)
    if isinstance(gains, str):
        return _Attempt(None, gains, held=2)
    group = need(first, Role).input_group
    assert group is not None, f"%{first.name} is a linear without an input group"
    site = RescaleSite(
        id=group,
        kind=f"{_word(producer)} -> {', '.join(dict.fromkeys(_word(node) for node in consumers))}",
        producer=producer,
        consumers=consumers,
        tensor=_tensor(first),
        channels=rows - 1,
        gains=gains,
        weights=tuple(_weight(node) for node in consumers),
    )
    if obstacle := facts.obstacle(site):
        return _Attempt(None, obstacle, held=2)
    return _Attempt(site, f"its scale goes to {_listed(consumers)}", activated=flow.activated)


def _gains(graph: Graph, producer: Node, leaf: Leaf) -> tuple[Gain, ...] | str:
    if leaf.kind is LeafKind.NORM:
        return norm_gains(graph.model.get_submodule(leaf.path), leaf.path, last_dim(producer) or 0)
    return tuple(Gain(f"{leaf.path}.{name}") for name in ("weight", "bias")[: 1 + leaf.bias])


def _tensor(linear: Node) -> Node:
    """The tensor that a linear really reads, whatever its shape and dtype."""
    tensor = source(linear)
    while is_op(tensor, *CASTS):
        tensor = source(tensor)
    return tensor


def _weight(node: Node) -> str:
    """The name of a linear's weight."""
    leaf = need(node, Leaf)
    if leaf.kind is not LeafKind.BARE_LINEAR:
        return f"{leaf.path}.weight"
    weight = tensor_arg(node, 1)
    while weight is not None and is_op(weight, *CASTS):
        weight = tensor_arg(weight, 0)
    assert weight is not None, f"%{node.name} has no weight"
    return str(weight.target)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What must be known of the whole graph: how often modules run, who shares which tensor, what runs where.

    `cached` are the leaves that make keys and values of a cache that is quantized.
    """

    calls: Mapping[str, int]
    owners: Mapping[str, tuple[str, ...]]
    reads: Mapping[str, int]
    place: Mapping[Node, int]
    cached: Set[Node]

    @classmethod
    def of(cls, graph: Graph) -> _Facts:
        by_tensor: dict[int, list[str]] = defaultdict(list)
        for name, tensor in graph.model.named_parameters(remove_duplicate=False):
            by_tensor[id(tensor)].append(name)
        reads: Counter[str] = Counter()
        for node in graph.nodes:
            if node.op == "get_attr":
                reads[str(node.target)] += _readers(node)
        return cls(
            calls=Counter(leaf.path for _, leaf in graph.leaves() if leaf.kind is not LeafKind.BARE_LINEAR),
            owners={name: tuple(names) for names in by_tensor.values() for name in names},
            reads=reads,
            place={node: index for index, part in enumerate(partitions(graph)) for node in part.nodes},
            cached=_leaves_behind(*(cached.node for cached in cached_tensors(graph))) if graph.kv_cache else set(),
        )

    def obstacle(self, site: RescaleSite) -> str | None:
        """Why the scale of a site cannot be written into the weights, or None."""
        writes = [(site.producer, [gain.name for gain in site.gains])]
        writes += [(node, [name]) for node, name in zip(site.consumers, site.weights, strict=True)]
        if fixed := [why for node, names in writes if (why := self._fixed(node, names))]:
            return fixed[0]
        if site.producer in self.cached:
            return "its values are cached, and the scale of the quantized cache is measured on them as they are"
        if any(self.place[node] != self.place[site.producer] for node in site.consumers):
            return f"{_listed(site.consumers)} run in another partition"
        return None

    def _fixed(self, node: Node, names: Iterable[str]) -> str | None:
        """Why these parameters of a leaf cannot be changed for this call alone, or None."""
        leaf = need(node, Leaf)
        if self.calls.get(leaf.path, 0) > 1:
            return f"{leaf.path} runs {self.calls[leaf.path]} times"
        own = 1 if leaf.kind is LeafKind.BARE_LINEAR else 0
        for name in names:
            if name not in self.owners:
                return f"{name} is no parameter of the model"
            if others := [other for other in self.owners[name] if other != name]:
                return f"{name} is tied to {others[0]}"
            if self.reads.get(name, 0) > own:
                return f"{name} is read elsewhere too"
        return None


def _readers(node: Node) -> int:
    """How many nodes read a tensor, as it is or cast to another dtype."""
    return sum(_readers(user) if is_op(user, *CASTS) else 1 for user in node.users)


def _miss(linear: Node, tried: Mapping[Node, _Attempt]) -> NearMiss:
    producers = sorted((node for node in _leaves_behind(*linear.all_input_nodes[:1]) if node in tried), reverse=True)
    if not producers:
        return NearMiss(linear, 0, "its input comes from no norm and no linear")
    held = max(tried[node].held for node in producers)
    nearest = [node for node in producers if tried[node].held == held][:_SHOWN]
    return NearMiss(linear, held, "; ".join(f"{need(node, Leaf).path}: {tried[node].why}" for node in nearest))


def _leaves_behind(*values: Node) -> set[Node]:
    """The leaves that values are made of, with no other leaf between."""
    return {n for n in ancestors(values, stop=lambda node: get(node, Leaf) is not None) if get(n, Leaf)}


def _listed(nodes: Iterable[Node]) -> str:
    return ", ".join(need(node, Leaf).path for node in nodes)


def _word(node: Node) -> str:
    role = get(node, Role)
    return str(role.structure if role and role.structure else need(node, Leaf).kind)
