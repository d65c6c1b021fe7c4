"""The linears of a graph as the loaders of its checkpoint will see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from qcompiler.emit.sites import EXPERT_PROJECTIONS, Site
from qcompiler.ir.annotations import Leaf, LeafKind, Role, Structure, need, scheme_of
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph
from qcompiler.source import ModelSource

LISTED = (LeafKind.LINEAR, LeafKind.CONV1D, LeafKind.BARE_LINEAR)


def sites(graph: Graph) -> list[Site]:
    """A site per linear, in the order in which they run. A module that runs twice is one site.

    Bare linears (routers) are sites too: runtimes build them as linears, so the config must say that they are dense. So
    are the projections of expert blocks, by the names that checkpoints give them.
    """
    found: dict[str, Site] = {}
    for node, leaf in graph.leaves():
        if leaf.kind in LISTED:
            found.setdefault(leaf.path, _site(node, leaf))
        elif leaf.kind is LeafKind.EXPERTS:
            found |= {site.name: site for site in expert_sites(graph, leaf)}
    return list(found.values())


def disk_sites(graph: Graph, source: ModelSource) -> list[Site]:
    """The same linears by the names of their tensors on disk, where those differ from the module's path.

    Transformers renames while loading, and matches targets against its own paths; other runtimes name modules as they
    find them on disk. A config is right when it means the same by both.
    """
    if not source.has_weights:
        return []
    known, stored = sites(graph), source.model.state_dict().keys()
    paths = {site.name for site in known}
    found: dict[str, Site] = {}
    for site in known:
        if site.expert_block is None and f"{site.name}.weight" in stored:
            name = (source.names.disk_name(f"{site.name}.weight") or site.name).removesuffix(".weight")
            found.setdefault(name, replace(site, name=name, fusion_group=None))
    for _, leaf in graph.leaves():
        if leaf.kind is LeafKind.EXPERTS:
            for name in experts_on_disk(source, leaf):
                found.setdefault(name, Site(name, 0, 0, structure=Structure.EXPERTS, kind="experts"))
    return [site for name, site in found.items() if name not in paths]


def experts_on_disk(source: ModelSource, leaf: Leaf) -> Iterator[str]:
    """The names on disk of the projections of one expert block, where they are stored expert by expert."""
    block = source.model.get_submodule(leaf.path)
    for name, parameter in block.named_parameters(recurse=False):
        if parameter.dim() == 3:
            yield from (key.removesuffix(".weight") for key in source.names.parts(f"{leaf.path}.{name}") or ())


def _site(node: Node, leaf: Leaf) -> Site:
    role = need(node, Role)
    return Site(
        name=leaf.path,
        out_features=leaf.out_features,
        in_features=leaf.in_features,
        scheme=scheme_of(node),
        class_name=leaf.class_name,
        has_bias=leaf.bias,
        fusion_group=role.fusion_group,
        structure=role.structure,
        kind="conv1d" if leaf.kind is LeafKind.CONV1D else "linear",
    )


def expert_sites(graph: Graph, leaf: Leaf) -> Iterator[Site]:
    """The projections of one expert block. A merged gate and up is two of them, by the names that runtimes use."""
    block = graph.model.get_submodule(leaf.path)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters(recurse=False) if p.dim() == 3}
    sizes = {name: (rows, columns) for name, (_, rows, columns) in shapes.items()}
    turned = {name: (rows, columns) for name, (columns, rows) in sizes.items()}
    # Transformers marks most classes that store [in, out]; of the rest, the sizes tell.
    if getattr(block, "is_transposed", False) or (_merged(turned) and not _merged(sizes)):
        sizes = turned
    for name, (out, inner) in sizes.items():
        halves = name in _merged(sizes)
        projections = EXPERT_PROJECTIONS[:2] if halves else (name,)
        for index in range(shapes[name][0]):
            for projection in projections:
                yield Site(
                    name=f"{leaf.path}.{index}.{projection}",
                    out_features=out // len(projections),
                    in_features=inner,
                    structure=Structure.EXPERTS,
                    kind="experts",
                    fusion_group=f"{leaf.path}.{index}.{name}" if halves else None,
                )


def _merged(sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """The projections that are gate and up in one: another leads back to their inputs, from half of their outputs."""
    return [name for name, (out, inner) in sizes.items() if (inner, out / 2) in sizes.values()]
