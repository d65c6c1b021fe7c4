"""Decide where the scales that rules ask for move: annotate each producer with what it gives to its consumers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence

from qcompiler.errors import RuleError
from qcompiler.ir.annotations import Leaf, Rescale, Role, annotate, get, get_quant, need
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph
from qcompiler.patterns.language import NearMiss
from qcompiler.patterns.rescaling import RescaleSite, rescale_sites
from qcompiler.report import Report
from qcompiler.transforms.options import TransformOptions


def place_transforms(graph: Graph, report: Report) -> None:
    """Annotate the producers of what rules want transformed with a `Rescale` each.

    A linear whose input no producer can rescale is quantized without; the report says so, and why. Linears that read
    the same tensor and were not asked for are rescaled with the others: their function stays what it was.

    Raises `RuleError` where two transforms are asked for one tensor.
    """
    asked = {
        node: quant.transform
        for node, _ in graph.linears()
        if (quant := get_quant(node)) is not None and quant.scheme is not None and quant.transform is not None
    }
    if not asked:
        return
    sites, misses = rescale_sites(graph)
    for site in sites:
        if any(node in asked for node in site.consumers):
            annotate(site.producer, _rescale(site, asked))
    _tell_shared(graph, report)
    _tell_missed(asked, misses, report)


def rescales(nodes: Sequence[Node]) -> list[Rescale]:
    """The scales that move between some nodes, in the order in which their producers run."""
    return [found for node in nodes if (found := get(node, Rescale)) is not None]


def blocked(rescale: Rescale, solved: Container[str]) -> bool:
    """Whether a scale can move no more, because its producer or a consumer is rounded already."""
    return any(path in solved for path in (rescale.producer, *rescale.consumers))


def runs_of(graph: Graph) -> dict[str, int]:
    """Which run solves each linear, by path, of those that one has claimed."""
    return {leaf.path: quant.run for node, leaf in graph.linears() if (quant := get_quant(node)) and quant.run}


def too_late(rescale: Rescale, runs: Mapping[str, int]) -> tuple[str, ...]:
    """The linears that ask for a scale which can move no more when the first of them is solved."""
    first = min((runs[path] for path in rescale.asked if path in runs), default=0)
    earlier = [path for path, run in runs.items() if run < first]
    return rescale.asked if blocked(rescale, earlier) else ()


def tell_blocked(graph: Graph, run: int, report: Report) -> None:
    """Say which transforms of a run come too late: an earlier one rounds what they would change, or moved the scale."""
    runs = runs_of(graph)
    late: dict[str, list[str]] = defaultdict(list)
    moved: dict[str, list[str]] = defaultdict(list)
    for found in rescales(graph.nodes):
        what = f"{found.transform.name} ({found.kind})"
        mine = [path for path in found.asked if runs.get(path) == run]
        if mine and too_late(found, runs):
            late[what] += mine
        elif mine and any(runs.get(path, run) < run for path in found.asked):
            moved[what] += mine
    for what, paths in late.items():
        report.fallback(
            f"no {what} for {_some(paths)}, quantized without it: an earlier calibrate rounds its producer, or another "
            "linear that reads the same tensor"
        )
    for what, paths in moved.items():
        report.fallback(
            f"no {what} for {_some(paths)} by themselves: an earlier calibrate chooses the scale of their inputs, for "
            "the linears that it solves of those that read the same tensor"
        )


def _rescale(site: RescaleSite, asked: Mapping[Node, TransformOptions]) -> Rescale:
    wanted = {need(node, Leaf).path: asked[node] for node in site.consumers if node in asked}
    first = next(iter(wanted))
    for path, options in wanted.items():
        if options != wanted[first]:
            raise RuleError(
                f"{first} is to be transformed by {wanted[first].name} ({wanted[first]}), and {path} by {options.name} "
                f"({options}), but they read the same tensor, which takes one scale",
                hint="give linears that read the same tensor the same transform",
            )
    return Rescale(
        id=site.id,
        kind=site.kind,
        producer=need(site.producer, Leaf).path,
        transform=wanted[first],
        asked=tuple(wanted),
        consumers=tuple(need(node, Leaf).path for node in site.consumers),
        channels=site.channels,
        tied=site.tied,
        gains=site.gains,
        weights=site.weights,
        because=(f"{wanted[first].name}: {site.kind}",),
    )


def _tell_shared(graph: Graph, report: Report) -> None:
    """One note for all the layers in which linears are rescaled because others are."""
    shared: dict[str, list[str]] = defaultdict(list)
    for found in rescales(graph.nodes):
        if others := [path for path in found.consumers if path not in found.asked]:
            shared[f"{found.transform.name} ({found.kind})"] += others
    for what, paths in shared.items():
        report.info(f"{what} also rescales the inputs of {_some(paths)}, which read the same tensor: no output changes")


def _tell_missed(asked: Mapping[Node, TransformOptions], misses: Sequence[NearMiss], report: Report) -> None:
    """One note for all the linears of one structure into which no scale can move."""
    whys = {miss.anchor: miss.why for miss in misses}
    missed: dict[tuple[str, object], list[Node]] = defaultdict(list)
    for node, options in asked.items():
        if node in whys:
            missed[options.name, need(node, Role).structure].append(node)
    for (name, _), nodes in missed.items():
        report.fallback(
            f"no {name} for {_some([need(node, Leaf).path for node in nodes])}, quantized without it: no producer "
            f"takes the scale ({whys[nodes[0]]})"
        )


def _some(paths: Sequence[str]) -> str:
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
