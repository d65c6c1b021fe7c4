"""Cut a partition where what is rounded changes what later observers see: its segments are solved one after the other.

GPTQ's authors call this the true sequential order: every linear is solved for inputs that the rounded ones before it
give, within a decoder layer as between layers. Each segment observes, is solved and then runs, so that every linear
runs once, where a whole layer would run once to observe and once more to propagate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping

from qcompiler.ir.annotations import AnyObserver, Leaf, Observer, Rescale, Role, get, need
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Partition
from qcompiler.patterns.place import rescales


def segments(
    part: Partition, watched: Mapping[Node, AnyObserver], rounds: Callable[[str], bool]
) -> tuple[Partition, ...]:
    """The segments of a partition, in order; itself where there is one.

    `watched` are its observers, `rounds` says which linears are rounded (by path). Solved together are linears that
    are called twice, that runtimes fuse, or between which a scale moves; and all that shares an observer.
    """
    if not any(_is_linear(node) and rounds(need(node, Leaf).path) for node in part.nodes):
        return (part,)
    levels = _levels(part, watched, rounds)
    merged = _merge(
        {levels[node] for node in watched}, max(levels.values(), default=0), _tied(part, levels, watched, rounds)
    )
    place = {node: merged[level] for node, level in levels.items()}
    count = 1 + max(place.values(), default=0)
    if count == 1:
        return (part,)
    outside = set(part.writes)
    found: list[Partition] = []
    for index in range(count):
        nodes = tuple(node for node in part.nodes if place[node] == index)
        members = set(nodes)
        reads = dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in members)
        writes = tuple(n for n in nodes if n in outside or any(user not in members for user in n.users))
        found.append(Partition(f"{part.name}, segment {index + 1}", part.layer, nodes, tuple(reads), writes))
    return tuple(found)


def _levels(part: Partition, watched: Mapping[Node, AnyObserver], rounds: Callable[[str], bool]) -> dict[Node, int]:
    """The segment of each node, where nothing ties: an observer comes one after what is rounded before it.

    Rounded are outputs of rounded linears, and cached keys and values. All else runs as soon as it can, but for norms
    that a scale is to be folded into: these run with what reads them.
    """
    levels: dict[Node, int] = {}
    late: set[Node] = set()  # such norms, and what lies between them and their readers
    open_: dict[Node, int] = {}  # of an observer that would read this node
    for node in part.nodes:
        sources = [source for source in node.all_input_nodes if source in levels]
        levels[node] = max((levels[source] for source in sources), default=0)
        open_[node] = max((open_[source] for source in sources), default=0)
        linear, observer, rescale = _is_linear(node), watched.get(node), get(node, Rescale)
        rounded = linear and rounds(need(node, Leaf).path)
        if rounded or observer is not None:
            levels[node] = open_[node]
        if rounded or (isinstance(observer, Observer) and observer.purpose != "input"):
            open_[node] += 1
        folded = rescale is not None and any(rounds(path) for path in rescale.asked)
        if node.users and not linear and observer is None and (folded or not late.isdisjoint(sources)):
            late.add(node)
    for node in reversed(part.nodes):
        if node in late and all(user in levels for user in node.users):
            levels[node] = min(levels[user] for user in node.users)
    for node in part.nodes:
        if node.op == "get_attr" and node.users:  # a weight is read where it is first used
            levels[node] = min(levels[user] for user in node.users if user in levels)
    return levels


def _is_linear(node: Node) -> bool:
    leaf = get(node, Leaf)
    return leaf is not None and leaf.is_linear


def _tied(
    part: Partition, levels: Mapping[Node, int], watched: Mapping[Node, AnyObserver], rounds: Callable[[str], bool]
) -> Iterator[list[int]]:
    """The levels of each set of nodes that belong together."""
    together: dict[object, list[int]] = defaultdict(list)
    by_path: dict[str, list[int]] = defaultdict(list)
    for node in part.nodes:
        if node in watched:
            together[type(watched[node]), watched[node].id].append(levels[node])
        if (leaf := get(node, Leaf)) is not None:
            by_path[leaf.path].append(levels[node])
            role = get(node, Role)
            if role is not None and role.fusion_group is not None and rounds(leaf.path):
                together["fused", role.fusion_group].append(levels[node])
    yield from together.values()
    yield from (found for path, found in by_path.items() if rounds(path))
    for rescale in rescales(part.nodes):
        if any(rounds(path) for path in rescale.asked):
            yield [level for path in (rescale.producer, *rescale.consumers) for level in by_path[path]]


def _merge(observed: Container[int], last: int, tied: Iterable[list[int]]) -> list[int]:
    """The segment of each level: one begins where something is observed, and not between what belongs together."""
    begins = [level == 0 or level in observed for level in range(last + 1)]
    for levels in tied:
        for level in range(min(levels) + 1, max(levels) + 1):
            begins[level] = False
    return [sum(begins[1 : level + 1]) for level in range(last + 1)]
