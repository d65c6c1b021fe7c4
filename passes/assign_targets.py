"""Assign schemes by the targets of compressed-tensors: a module's class, its name, or an expression."""

from __future__ import annotations

import glob
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from qcompiler import select
from qcompiler.emit.groups import Claims, TargetGroups, TargetText, first_target
from qcompiler.emit.mappings import TransformSites
from qcompiler.emit.patterns import TargetList
from qcompiler.errors import did_you_mean
from qcompiler.expressions import REGEX_PREFIX
from qcompiler.ir.annotations import Claim, Leaf, LeafKind, Quant, consider, get_quant, need, set_quant
from qcompiler.ir.fusion import check_fusion
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Stage
from qcompiler.options import Options
from qcompiler.pipeline import Context
from qcompiler.pipeline.base import GraphPass
from qcompiler.scheme import KVCacheSpec, SchemeField
from qcompiler.select import Select
from qcompiler.solvers.options import GptqOptions, RtnOptions, SolverField
from qcompiler.transforms.options import TransformField


class TargetGroup(Options):
    """What becomes of the linears that one of `targets` means. `scheme: null` leaves them dense."""

    targets: Annotated[tuple[TargetText, ...], Field(min_length=1)]
    scheme: SchemeField | None
    solver: SolverField = RtnOptions()
    transform: TransformField = None

    @property
    def short(self) -> str:
        """What it decides, in words."""
        return self.quant(()).short

    def decides_as(self, other: TargetGroup) -> bool:
        return self.model_copy(update={"targets": other.targets}) == other

    def quant(self, because: tuple[str, ...]) -> Quant:
        if self.scheme is None:
            return Quant(None, "none", because)
        options = self.solver if isinstance(self.solver, GptqOptions) else None
        return Quant(self.scheme, self.solver.name, because, options, self.transform)


class Assignment(Options):
    """Groups of targets, in order, and what is left out of them. `transform_sites`: where their transforms apply."""

    groups: tuple[TargetGroup, ...] = ()
    ignore: tuple[TargetText, ...] = ()
    transform_sites: TransformSites | None = None

    def rescaled(self, graph: Graph) -> Container[Node]:
        """The linears to which transforms apply; see `TransformSites.consumers`."""
        if self.transform_sites is None or not any(group.transform for group in self.groups):
            return [node for node, _ in graph.linears()]
        return self.transform_sites.consumers(graph)


@dataclass(frozen=True, kw_only=True)
class AssignTargets(GraphPass):
    """Give linears schemes by targets, as configs and recipes do: a class, an exact name, or `re:` and an expression.

    Where several groups mean a linear, names come before classes, and then the first group decides, as in vLLM; a
    warning says who else meant it, and which group compressed-tensors takes. A later assignment decides over an
    earlier one, with a warning, but not on what it ignores. Targets and ignores that match nothing are warnings with
    near misses. `notes` and `differences` are words for the report: what has no effect, and what is done otherwise
    than it was asked for where this pass was translated from.
    """

    name: ClassVar[str] = "assign-targets"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CAPTURED, Stage.ANNOTATED})
    ensures: ClassVar[Stage] = Stage.ANNOTATED

    assignments: tuple[Assignment, ...] = ()
    kv_cache: KVCacheSpec | None = None
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    def quants_named(self) -> Iterable[Quant]:
        groups = (group for assignment in self.assignments for group in assignment.groups)
        return [group.quant(()) for group in groups if group.scheme is not None]

    def may_measure(self) -> bool:
        return self.kv_cache is not None or super().may_measure()

    def run(self, graph: Graph, context: Context) -> None:
        for text in self.notes:
            context.report.info(text)
        for text in self.differences:
            context.report.fallback(text)
        for assignment in self.assignments:
            self._assign(assignment, graph, context)
        check_fusion(
            graph,
            mend="let a target or an ignore mean all of them or none; `re:` matches beginnings of names: "
            "re:.*gate means gate_proj too, and re:.*gate$ does not",
        )
        if self.kv_cache is not None:
            graph.quantize_cache(self.kv_cache, by=self.name)

    def _assign(self, assignment: Assignment, graph: Graph, context: Context) -> None:
        for text in _idle(assignment, graph):
            context.report.warning(f"{self.name}: {text}")
        told: dict[_Note, dict[str, None]] = {}
        ignore = TargetList(assignment.ignore)
        groups = TargetGroups([group.targets for group in assignment.groups])
        rescaled = assignment.rescaled(graph)
        for node, leaf in graph.leaves():
            ignored = first_target(ignore, leaf)
            claims = groups.claims(leaf) if leaf.kind is not LeafKind.NORM else None
            if leaf.is_linear:
                self._remember(node, ignored, claims, assignment.groups)
            if ignored is not None:
                if leaf.is_linear and get_quant(node) is None:
                    set_quant(node, Quant(None, "none", (f"{self.name}: ignore {ignored}",)))
                continue
            if claims is not None:
                for note in self._decide(node, leaf, assignment.groups, claims, node in rescaled):
                    told.setdefault(note, {})[leaf.path] = None
        for note, paths in told.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            text = f"{self.name}: {note.before}{next(iter(paths))}{more}{note.after}"
            (context.report.warning if note.kind == "warning" else context.report.fallback)(text)

    def _remember(self, node: Node, ignored: str | None, claims: Claims | None, groups: Sequence[TargetGroup]) -> None:
        """Note at a linear which targets mean it, for those who ask why."""
        hidden = f"{self.name}: ignore {ignored}" if ignored is not None else ""
        if ignored is not None:
            consider(node, Claim(hidden, ignored, "dense"))
        for meant in (claims.first, *claims.others) if claims is not None else ():
            group = groups[meant.group]
            consider(node, Claim(f"{self.name}: {meant.target}", meant.target, group.short, hidden=hidden))

    def _decide(
        self, node: Node, leaf: Leaf, groups: Sequence[TargetGroup], claims: Claims, rescaled: bool
    ) -> Iterator[_Note]:
        """Give a linear what its group says."""
        group, target = groups[claims.first.group], claims.first.target
        if not leaf.is_linear:
            yield _Note("fallback", "", f" stays dense, though {target} means it: {leaf.kind} is not quantized")
            return
        yield from _conflict(groups, claims)
        present = get_quant(node)
        because: tuple[str, ...] = (f"{self.name}: {target}",)
        if present is not None:
            because = (*because, f"over {present.because[0]}")
            if present.scheme is not None:
                yield _Note("warning", f"{target} decides on ", f", over {present.because[0]}")
        quant = group.quant(because)
        set_quant(node, quant if rescaled else replace(quant, transform=None), replacing=present)


@dataclass(frozen=True, slots=True)
class _Note:
    """What is said once of all linears that it is true of: their paths stand between `before` and `after`."""

    kind: Literal["warning", "fallback"]
    before: str
    after: str


def _conflict(groups: Sequence[TargetGroup], claims: Claims) -> Iterator[_Note]:
    """A warning where another group has other words for the same linear."""
    group, target = groups[claims.first.group], claims.first.target
    others = [(groups[o.group], o.target) for o in claims.others if not group.decides_as(groups[o.group])]
    if others:
        said = " and ".join(f"{target} ({group.short})" for group, target in [(group, target), *others])
        taken = groups[claims.library.group]
        library = "takes it too" if group.decides_as(taken) else f"takes {claims.library.target} ({taken.short})"
        yield _Note("warning", f"{said} mean ", f": the first of them decides; compressed-tensors {library}")


def _idle(assignment: Assignment, graph: Graph) -> Iterator[str]:
    """Targets and ignores that match nothing. No errors: recipes carry such lines from one model to the next."""
    leaves = list(graph.leaves())
    linears = [node for node, leaf in leaves if leaf.is_linear]
    for target in dict.fromkeys(target for group in assignment.groups for target in group.targets):
        met = [leaf for _, leaf in leaves if first_target(TargetList([target]), leaf)]
        if not any(leaf.is_linear for leaf in met):
            instead = f" (only {met[0].kind}: {met[0].path})" if met else ""
            near = _near_misses(target, linears, graph.layer_count)
            yield f"target {target} matches no linear{instead}; {near}"
    sites = assignment.transform_sites or TransformSites()
    said = [("ignore", target) for target in (*assignment.ignore, *sites.ignore)]
    said += [("mapping", target) for m in sites.mappings or () for target in (m.producer, *m.consumers)]
    for what, target in dict.fromkeys(said):
        if not any(first_target(TargetList([target]), leaf) for _, leaf in leaves):
            near = _near_misses(target, [node for node, _ in leaves], graph.layer_count)
            yield f"{what} {target} matches nothing; {near}"


def _near_misses(target: str, nodes: Sequence[Node], layer_count: int) -> str:
    if not target.startswith(REGEX_PREFIX):
        close = did_you_mean(target, {need(node, Leaf).class_name for node in nodes})
        if close:
            return close.removeprefix("; ")
        target = glob.escape(target)
    wanted = Select(name=(target,))
    return select.find(wanted, nodes, layer_count=layer_count).explain(wanted, nodes)
