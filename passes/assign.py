"""Assign schemes to linears by rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from qcompiler import select
from qcompiler.errors import RuleError
from qcompiler.ir.annotations import Claim, Leaf, LeafKind, Quant, consider, get_quant, need, set_quant
from qcompiler.ir.fusion import check_fusion
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Stage
from qcompiler.options import Options
from qcompiler.patterns.nearest import why_no_structure
from qcompiler.pipeline import Context
from qcompiler.pipeline.base import GraphPass
from qcompiler.scheme import KVCacheSpec, QuantSpec, Scheme, SchemeField, Strategy
from qcompiler.select import Select, Selection
from qcompiler.solvers.options import GptqOptions, RtnOptions, SolverField
from qcompiler.transforms.options import TransformField

Find = partial[Selection]
"""`select.find` for one model: it knows how many layers there are."""


class Rule(Options):
    """What becomes of the linears that `select` means. `scheme: null` leaves them dense.

    `transform` rescales their inputs before `solver` rounds their weights.
    """

    select: Select
    scheme: SchemeField | None
    solver: SolverField = RtnOptions()
    transform: TransformField = None
    optional: bool = False
    override: bool = False


@dataclass(frozen=True, kw_only=True)
class Assign(GraphPass):
    """Give every linear that a rule selects its scheme.

    Ignored layers stay dense and no rule sees them. A select that matches nothing is an error (`optional: true` on a
    rule allows it), as are two rules for one linear (unless the later one says `override: true`) and two schemes among
    linears whose outputs the runtime fuses. `on_indivisible` says what happens where a group size does not divide the
    inputs of a linear: error, `channel` (one scale per row instead) or `dense`. `kv_cache` quantizes the key/value
    cache to FP8.
    """

    name: ClassVar[str] = "assign"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CAPTURED, Stage.ANNOTATED})
    ensures: ClassVar[Stage] = Stage.ANNOTATED

    rules: tuple[Rule, ...] = ()
    ignore: tuple[Select, ...] = ()
    on_indivisible: Literal["error", "channel", "dense"] = "error"
    kv_cache: KVCacheSpec | None = None

    def quants_named(self) -> Iterable[Quant]:
        return [_decided(rule.scheme, rule, ()) for rule in self.rules if rule.scheme is not None]

    def may_measure(self) -> bool:
        return self.kv_cache is not None or super().may_measure()

    def run(self, graph: Graph, context: Context) -> None:
        leaves = [node for node, leaf in graph.leaves() if leaf.kind is not LeafKind.NORM]
        find = partial(select.find, layer_count=graph.layer_count)
        ignored = self._ignore(leaves, find, context.running or self.name)
        scope = _Scope(graph, [node for node in leaves if node not in ignored], ignored, find)
        asked: dict[Node, tuple[Rule, str]] = {}  # by whom; the last word counts
        for number, rule in enumerate(self.rules, 1):
            who = f"{context.running or self.name}: rule {number}"
            asked |= dict.fromkeys(self._apply(rule, who, scope, context), (rule, who))
        self._fit(asked, context)
        self._remember(leaves, ignored, find, context.running or self.name)
        check_fusion(graph, mend="select by structure (attention-input, mlp-input) instead of by name")
        blocks = [leaf for _, leaf in graph.leaves() if leaf.kind is LeafKind.EXPERTS]
        if blocks:
            context.report.info(f"blocks of experts stay dense: {len(blocks)}, {blocks[0].path} the first of them")
        if self.kv_cache is not None:
            graph.quantize_cache(self.kv_cache, by=self.name)

    def _ignore(self, leaves: list[Node], find: Find, who: str) -> dict[Node, str]:
        ignored: dict[Node, str] = {}
        for number, wanted in enumerate(self.ignore, 1):
            selection = find(wanted, leaves)
            if not selection.nodes:
                raise RuleError(
                    f"{who}: ignore {number} {wanted} matches nothing; {selection.explain(wanted, leaves)}",
                    hint="remove it, or mend its keys: `qcompiler plan` lists what the model has",
                )
            _check_idle(wanted, f"{who}: ignore {number}", leaves, find.keywords["layer_count"])
            for node in selection.nodes:
                present = get_quant(node)
                if present is not None and present.scheme is not None:
                    raise RuleError(
                        f"{who}: ignore {number} {wanted} would leave {need(node, Leaf).path} dense, and "
                        f"{', '.join(present.because)} gave it a scheme before",
                        hint="ignore it in that pass, or override it here with a rule whose scheme is null",
                    )
                ignored.setdefault(node, f"{who}: ignore {number}")
        for node, because in ignored.items():
            if need(node, Leaf).is_linear and get_quant(node) is None:
                set_quant(node, Quant(None, "none", (because,)))
        return ignored

    def _apply(self, rule: Rule, who: str, scope: _Scope, context: Context) -> tuple[Node, ...]:
        """Give the linears that a rule selects its scheme; which they are."""
        linears = [node for node in scope.candidates if need(node, Leaf).is_linear]
        selection = scope.find(rule.select, linears)
        if not selection.nodes:
            if rule.optional:
                why = scope.instead(rule.select)
                context.report.info(f"{who} {rule.select} matches no linear{why}, which its `optional` allows")
                return ()
            raise RuleError(
                f"{who} {rule.select} matches no linear{scope.instead(rule.select)}; "
                f"{selection.explain(rule.select, linears)}{scope.nearest(rule.select)}",
                hint="mend its keys, or say `optional: true`: `qcompiler plan` lists what the model has",
            )
        if not rule.optional:
            _check_idle(rule.select, who, [*scope.candidates, *scope.ignored], scope.find.keywords["layer_count"])
        for node in selection.nodes:
            present = get_quant(node)
            leaf = need(node, Leaf)
            if present is not None and not rule.override:
                raise RuleError(
                    f"{who} {rule.select} and {', '.join(present.because)} both decide {leaf.path}",
                    hint="narrow one of them, or say `override: true` on the later",
                )
            because = (who,) if present is None else (who, f"over {present.because[0]}")
            set_quant(node, _decided(rule.scheme, rule, because), replacing=present)
        return selection.nodes

    def _fit(self, asked: dict[Node, tuple[Rule, str]], context: Context) -> None:
        """Once every rule has spoken: what becomes of groups that do not divide. One note for all that are alike."""
        told: dict[tuple[str, str], dict[str, None]] = {}
        for node, (rule, who) in asked.items():
            leaf, present = need(node, Leaf), need(node, Quant)
            grouped = rule.scheme.undivided(leaf.in_features) if rule.scheme else None
            if rule.scheme is None or grouped is None:
                continue
            what = f"group size {grouped.group_size} does not divide the {leaf.in_features} inputs"
            scheme = self._instead(rule.scheme, leaf, f"{who}: {what} of {leaf.path}")
            set_quant(node, _decided(scheme, rule, (*present.because, what)), replacing=present)
            told.setdefault((what, who), {})[leaf.path] = None
        for (what, who), paths in told.items():
            first, more = next(iter(paths)), f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            context.report.fallback(f"{what} of {first}{more}: {self.on_indivisible} instead ({who})")

    def _remember(self, leaves: Sequence[Node], ignored: Mapping[Node, str], find: Find, who: str) -> None:
        """Note at every linear which rules mean it, or miss it by one key, for those who ask why."""
        linears = [node for node in leaves if need(node, Leaf).is_linear]
        for number, wanted in enumerate(self.ignore, 1):
            for node in find(wanted, linears).nodes:
                consider(node, Claim(f"{who}: ignore {number}", str(wanted), "dense"))
        for number, rule in enumerate(self.rules, 1):
            quant = _decided(rule.scheme, rule, ())
            claim = Claim(f"{who}: rule {number}", str(rule.select), quant.short)
            selection = find(rule.select, linears)
            for node in selection.nodes:
                consider(node, replace(claim, hidden=ignored.get(node, "")))
            for node, key in selection.near:
                if node not in selection.nodes:
                    consider(node, replace(claim, missed=f"{key.rstrip('_')}: {select.has(node, key)}"))

    def _instead(self, scheme: Scheme, leaf: Leaf, wrong: str) -> Scheme | None:
        """What `on_indivisible` makes of a scheme whose groups do not divide a linear's inputs."""
        channel = _per_channel(scheme, leaf.in_features)
        if self.on_indivisible == "error" or (self.on_indivisible == "channel" and channel is None):
            raise RuleError(
                wrong + ("" if channel else f" ({scheme.short} has no per-channel form)"),
                hint="choose a group size that divides, or say on_indivisible: "
                + ("channel or dense" if channel else "dense"),
            )
        return channel if self.on_indivisible == "channel" else None


def _check_idle(wanted: Select, who: str, leaves: Sequence[Node], layer_count: int) -> None:
    """Raise `RuleError` where one of several names or layers matches nothing, though another does."""
    lost = select.idle(wanted, leaves, layer_count=layer_count)
    if lost:
        raise RuleError(
            f"{who} {wanted}: nothing has {' or '.join(lost)}",
            hint="remove it, or mend it: `qcompiler plan` lists what the model has",
        )


def _per_channel(scheme: Scheme, in_features: int) -> Scheme | None:
    """The scheme with one scale per row of the weight; None where its numbers or its activations need groups."""
    w = scheme.weights
    if w.scale_dtype is not None:
        return None
    channel = QuantSpec(type=w.type, bits=w.bits, symmetric=w.symmetric, strategy=Strategy.CHANNEL)
    found = Scheme(weights=channel, input_activations=scheme.input_activations)
    return found if found.undivided(in_features) is None else None


@dataclass(frozen=True, slots=True)
class _Scope:
    """What rules may select from, what they may not because it is ignored, and how to look."""

    graph: Graph
    candidates: list[Node]
    ignored: dict[Node, str]
    find: Find

    def instead(self, wanted: Select) -> str:
        """What a rule selected that is no linear of its own, if anything."""
        others = [need(node, Leaf) for node in self.find(wanted, self.candidates).nodes]
        if others:
            kinds = ", ".join(sorted({str(leaf.kind) for leaf in others}))
            return f" (only {kinds}: {others[0].path}, which is not quantized)"
        hidden = self.find(wanted, list(self.ignored)).nodes if self.ignored else ()
        return f" ({need(hidden[0], Leaf).path} is hidden by {self.ignored[hidden[0]]})" if hidden else ""

    def nearest(self, wanted: Select) -> str:
        """What came nearest to structures that it names and the model does not have, if any."""
        near = why_no_structure(self.graph, wanted.structure or ())
        return f"; {near}" if near else ""


def _decided(scheme: Scheme | None, rule: Rule, because: tuple[str, ...]) -> Quant:
    if scheme is None:
        return Quant(None, "none", because)
    options = rule.solver if isinstance(rule.solver, GptqOptions) else None
    return Quant(scheme, rule.solver.name, because, options, rule.transform)
