"""What observes the tensor that a linear reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcompiler.ir.annotations import AnyObserver, Leaf, need, observed
from qcompiler.ir.fx import Node, tensor_arg
from qcompiler.ir.ops import observe


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
