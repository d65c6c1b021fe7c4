"""Solve every linear, partition by partition: transform, choose scales, round the weight."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from qcompiler import select
from qcompiler.data import CalibrationSpec
from qcompiler.errors import ConfigError, RuleError, did_you_mean
from qcompiler.ir.annotations import InputObserver, Leaf, Role, get_quant, need, observed, set_quant
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.observers import observers
from qcompiler.patterns.place import tell_blocked
from qcompiler.pipeline import Context, PartitionStep, StreamingPass
from qcompiler.runtime.solve import Propagation, SolveStep, solved_by, uses
from qcompiler.select import Select


@dataclass(frozen=True, kw_only=True)
class Calibrate(StreamingPass):
    """Transform and round every weight as its rule says, all in one run over the data.

    `scales`: those of each weight's range (`minmax`), of least squared error (`mse`), or of least squared error
    weighted by how large each input is (`importance`, which insert-observers must measure). Solver `rtn` rounds to
    nearest; `gptq` rounds column by column, and spreads each one's error over those that are left.

    The same data in the same batches gives the same bytes, whatever the threads. Another `batch_tokens` adds up the
    same terms in another order: scales that come of weights alone stay equal, and what data decides may differ in the
    last bit, and so a code here and there.

    What comes after a linear sees it rounded, whether in its layer or in later ones; with `propagate: layer` only later
    layers do, and with `propagate: false` none.

    A pipeline may have several, each a run of its own over the data, that starts from the model as the one before left
    it: `select` and `algorithms` (such as `awq`, `gptq`, `smoothquant+gptq`) say which linears are its own, and
    `calibration` what data it sees (default: what the compilation is given).
    """

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED, Stage.CALIBRATED})
    ensures: ClassVar[Stage] = Stage.CALIBRATED

    scales: Literal["minmax", "mse", "importance"] = "minmax"
    propagate: Propagation = True
    select: tuple[Select, ...] = ()
    algorithms: tuple[str, ...] = ()
    calibration: CalibrationSpec | None = None

    def apart(self, algorithms: tuple[str, ...]) -> tuple[StreamingPass, ...]:
        if self.algorithms:
            return tuple(replace(self, algorithms=(name,)) for name in algorithms if name in self.algorithms)
        *first, _ = algorithms
        # The last takes what is left: a transform may not apply to all that a rule names it for.
        return (*(replace(self, algorithms=(name,)) for name in first), self)

    def calibration_data(self) -> CalibrationSpec | None:
        return self.calibration

    def measures(self, graph: Graph, run: int) -> bool:
        mine = solved_by(graph, run)
        return any(uses(found, mine) for node in graph.nodes if (found := observed(node)) is not None)

    def prepare(self, graph: Graph, context: Context) -> None:
        """Claim what this run solves: linears that no earlier run has claimed."""
        free = [n for n, _ in graph.linears() if (q := get_quant(n)) is not None and q.scheme and q.run is None]
        mine = self._by_algorithm(self._selected(free, graph.layer_count))
        for node in mine:
            quant = get_quant(node)
            assert quant is not None
            set_quant(node, replace(quant, run=context.sweep), replacing=quant)
        _check_fusion(graph)
        tell_blocked(graph, context.sweep, context.report)
        if self.scales == "importance":
            _check_measured(mine)

    def begin(self, graph: Graph, context: Context) -> PartitionStep:
        return SolveStep(graph, context, run=context.sweep, scales=self.scales, propagate=self.propagate)

    def _selected(self, free: list[Node], layer_count: int) -> list[Node]:
        if not self.select:
            return free
        chosen: dict[Node, None] = {}
        for number, wanted in enumerate(self.select, 1):
            selection = select.find(wanted, free, layer_count=layer_count)
            if not selection.nodes:
                raise RuleError(
                    f"{self.name}: select {number} {wanted} matches no linear that is left to calibrate; "
                    f"{selection.explain(wanted, free)}",
                    hint="mend its keys: `qcompiler plan` lists what the model has",
                )
            chosen |= dict.fromkeys(selection.nodes)
        return list(chosen)

    def _by_algorithm(self, nodes: list[Node]) -> list[Node]:
        if not self.algorithms:
            return nodes
        by_name: dict[str, list[Node]] = defaultdict(list)
        for node in nodes:
            if (quant := get_quant(node)) is not None:
                by_name[quant.algorithm].append(node)
        for name in self.algorithms:
            if name not in by_name:
                raise RuleError(
                    f"{self.name}: nothing that is left to calibrate is solved by {name!r}"
                    f"{did_you_mean(name, by_name)}",
                    hint=f"what is left is solved by {', '.join(sorted(by_name)) or 'nothing'}",
                )
        return [node for name in self.algorithms for node in by_name[name]]


def _check_fusion(graph: Graph) -> None:
    """Linears that the runtime fuses are solved together: they may have to share a scale."""
    runs: dict[str, tuple[Node, int | None]] = {}
    for node, leaf in graph.linears():
        group, quant = need(node, Role).fusion_group, get_quant(node)
        if group is None or quant is None or quant.scheme is None:
            continue
        other, run = runs.setdefault(group, (node, quant.run))
        if run != quant.run:
            raise RuleError(
                f"calibrate: {need(other, Leaf).path} and {leaf.path} are fused by runtimes, and so belong in one run",
                hint="select the whole of attention-input or mlp-input in one calibrate",
            )


def _check_measured(nodes: list[Node]) -> None:
    """Before anything runs: scales by importance need to know the inputs of every linear."""
    for node in nodes:
        if not any(isinstance(observer, InputObserver) for observer in observers(node)):
            raise ConfigError(
                f"calibrate: scales: importance weighs errors by how large inputs are, and nothing measures those of "
                f"{need(node, Leaf).path}",
                hint="write insert-observers: {importance: true}, or scales: mse",
            )
