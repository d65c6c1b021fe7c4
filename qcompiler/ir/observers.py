"""What observes the tensor that a linear reads, and who shares a statistic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from qcompiler.errors import LegalityError
from qcompiler.ir.annotations import AnyObserver, ChannelObserver, Leaf, Observer, need, observed
from qcompiler.ir.fx import Node, tensor_arg
from qcompiler.ir.graph import Graph
from qcompiler.ir.ops import observe
from qcompiler.ir.partition import partitions

LEAVE_CACHE = "take out kv_cache (kv_cache_scheme in a recipe)"
"""The mend of what no cache can be quantized for."""


def observers(linear: Node) -> Iterator[AnyObserver]:
    """The observers before a linear that collect for it, the nearest first."""
    path = need(linear, Leaf).path
    for node in _chain(linear):
        found = observed(node)
        if found is not None and path in found.consumers:
            yield found


def unobserved(linear: Node) -> Node:
    """The tensor that a linear reads, whoever else looks at it."""
    *_, last = (linear, *_chain(linear))
    source = tensor_arg(last, 0)
    assert source is not None, f"%{linear.name} reads no tensor"
    return source


def _chain(linear: Node) -> Iterator[Node]:
    node = tensor_arg(linear, 0)
    while node is not None and node.target is observe:
        yield node
        node = tensor_arg(node, 0)


def as_one(asked: Sequence[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """For each (id of a statistic, paths of modules that use it): the id and the users of what it becomes part of.

    A module has one statistic, of all that it reads. So statistics that share a module, or an id, are one: the first.
    """
    position = {id_: index for index, (id_, _) in reversed(list(enumerate(asked)))}
    part_of = {id_: id_ for id_, _ in asked}
    first_of: dict[str, str] = {}

    def whole(id_: str) -> str:
        while part_of[id_] != id_:
            id_ = part_of[id_]
        return id_

    for id_, paths in asked:
        for path in paths:
            first, second = sorted((whole(first_of.setdefault(path, id_)), whole(id_)), key=position.__getitem__)
            part_of[second] = first
    users: dict[str, dict[str, None]] = {}
    for id_, paths in asked:
        users.setdefault(whole(id_), {}).update(dict.fromkeys(paths))
    return [(whole(id_), tuple(users[whole(id_)])) for id_, _ in asked]


def check_partitions(graph: Graph) -> None:
    """Raise `LegalityError` where what one statistic takes in, or who uses it, lies in several partitions.

    Calibration sees one at a time.
    """
    seen: dict[str, AnyObserver] = {}
    nodes: dict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if (observer := observed(node)) is not None:
            seen[observer.id] = observer
            nodes[observer.id].append(node)
    for node, _ in graph.linears():
        for observer in observers(node):
            nodes[observer.id].append(node)
    place = {node: part.name for part in partitions(graph) for node in part.nodes}
    for id_, observer in seen.items():
        names = dict.fromkeys(place[node] for node in nodes[id_])
        if len(names) > 1:
            message, mend = _torn(observer, ", ".join(names))
            raise LegalityError(message, hint=mend)


def _torn(observer: AnyObserver, places: str) -> tuple[str, str]:
    what, mend = "Hessian of its inputs", "use solver rtn, or ignore this layer"
    if isinstance(observer, ChannelObserver):
        what, mend = "importance of its inputs", "leave importance out of insert-observers, or ignore this layer"
    if isinstance(observer, Observer):
        what = f"static scale of its {observer.purpose}"
        mend = "use a scheme whose activations are dynamic, or ignore this layer"
        if observer.purpose != "input":
            mend = LEAVE_CACHE
    first, *others = observer.consumers
    who = f"{first} runs" if not others else f"{first} and {len(others)} more that share an input with it run"
    return (
        f"{who} in several partitions ({places}): no {what} can be measured, because "
        "calibration sees one partition at a time",
        mend,
    )
