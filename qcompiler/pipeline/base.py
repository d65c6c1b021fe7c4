"""The pass protocol.

A `GraphPass` edits the whole graph at once. A `StreamingPass` works on one partition at a time, with its weights at
hand: consecutive streaming passes are fused into one sweep, so that a partition is loaded, solved and written before
the next is touched, and memory does not grow with depth.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from qcompiler.ir.annotations import AnyObserver, Observer, Quant
from qcompiler.ir.graph import Graph, Partition, Stage
from qcompiler.ir.rules.observers import needs_data
from qcompiler.numerics.tensor import QuantizedTensor
from qcompiler.report import Report

if TYPE_CHECKING:
    from qcompiler.data.batches import TokenData
    from qcompiler.data.spec import CalibrationSpec
    from qcompiler.runtime.channels import ChannelStatistic
    from qcompiler.runtime.hessian import HessianStatistic
    from qcompiler.runtime.parallel import Workers
    from qcompiler.runtime.statistics import Statistic
    from qcompiler.runtime.weights import LazyWeights
    from qcompiler.source import ModelSource


class Pass(ABC):
    """Base of all passes: a frozen dataclass whose fields are its options.

    `requires` are the stages of a graph that it accepts, `ensures` the stage that it leaves (None: unchanged).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    name: ClassVar[str]
    requires: ClassVar[frozenset[Stage]]
    ensures: ClassVar[Stage | None] = None

    def quants_named(self) -> Iterable[Quant]:
        """What this pass may decide for some linear, but for leaving it dense."""
        return ()

    def may_measure(self) -> bool:
        """Whether this pass may ask for what only data tells: then data is read before the model is captured."""
        return any(map(needs_data, self.quants_named()))


class GraphPass(Pass):
    """A pass over the whole graph. It reads no weight."""

    @abstractmethod
    def run(self, graph: Graph, context: Context) -> None:
        """Edit or annotate `graph`; say in `context.report` what a user should know. Raises a `QCompilerError`."""


class StreamingPass(Pass):
    """A pass that works partition by partition."""

    def apart(self, algorithms: tuple[str, ...]) -> tuple[StreamingPass, ...]:
        """What takes this pass's place where each algorithm is to have a run of its own."""
        return (self,)

    def calibration_data(self) -> CalibrationSpec | None:
        """The data that this pass's sweep is to see; None: what the whole compilation was given."""
        return None

    def measures(self, graph: Graph, run: int) -> bool:
        """Whether the sweep `run` of a prepared graph needs what observers collect, and so data."""
        return True

    def prepare(self, graph: Graph, context: Context) -> None:
        """Before any weight is read, when planning too: check and claim what the sweep `context.sweep` will do.

        Raises a `QCompilerError` for what would fail later.
        """
        return

    @abstractmethod
    def begin(self, graph: Graph, context: Context) -> PartitionStep:
        """Start a sweep; the step is called for each partition, in order."""


class PartitionStep:
    """One sweep of one streaming pass.

    `solves`: it rounds linears, in `segment`. `propagates`: later partitions are to see what it rounds. For each
    partition `segment` is called for each of its segments (see `PartitionWork`); and `partition` once: of steps before
    the one that solves before all segments, of the others after them.
    """

    solves: bool = False
    propagates: bool = True

    def uses(self, observer: AnyObserver) -> bool:
        """Whether this step needs what an observer collects: what no step needs is not collected."""
        return True

    def rounds(self, path: str) -> bool:
        """Whether `segment` rounds the linear at a path, and what comes after it in its partition is to see it so."""
        return False

    def segment(self, work: PartitionWork) -> None:
        """Do this pass's part for `work.segment`, before what comes after it is observed."""
        return

    def partition(self, work: PartitionWork) -> None:
        """Do this pass's part for a whole partition."""
        return

    def finish(self) -> None:
        """After the last partition: what is left to do for the whole graph."""
        return

    def publish(self) -> None:
        """Every pass of the pipeline has finished: let what this one made be seen outside."""
        return

    def abort(self) -> None:
        """The sweep, a later pass or publishing failed: leave nothing behind."""
        return


@dataclass(frozen=True, slots=True)
class Solved:
    """A solved linear: its quantized weight, and what was measured of its input (None where nothing is static)."""

    weight: QuantizedTensor
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    input_global_scale: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """What observers collected in one partition, by id: ranges of activations, Hessians, and what channels are like.

    Hessians are large: the step that solves by them takes them out.
    """

    ranges: MutableMapping[str, Statistic] = field(default_factory=dict)
    hessians: MutableMapping[str, HessianStatistic] = field(default_factory=dict)
    channels: MutableMapping[str, ChannelStatistic] = field(default_factory=dict)


@dataclass(slots=True)
class PartitionWork:
    """What a step sees of one partition, and of `segment`: those of its nodes that are solved together.

    A partition has several segments where linears are solved on inputs that others, solved before, give. `weights` are
    its parameters and buffers by path, in the model's dtype, on the device, read when asked for. `statistics` are what
    observers collected so far. Steps fill `solved` (by module path) and `caches` (scales of keys and values, by
    observer), and name in `altered` the weights that they replaced and that stay dense. `workers` are the sweep's
    threads. `spent` is what a step's seconds went to, by name; of work side by side, its share of them.
    """

    partition: Partition
    segment: Partition
    weights: LazyWeights
    workers: Workers
    statistics: Statistics = field(default_factory=Statistics)
    solved: dict[str, Solved] = field(default_factory=dict)
    altered: set[str] = field(default_factory=set)
    caches: dict[Observer, Tensor] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the checkpoint goes."""

    folder: Path
    overwrite: bool = False


@dataclass(slots=True)
class Context:
    """What passes may use besides the graph.

    `source` is the model with its (lazily read) weights, `data` gives the calibration batches when a sweep needs them,
    `output` is where the checkpoint goes (None while planning), `running` what the graph pass that runs is called: its
    name, numbered where the pipeline has several of that name. `sweep` counts the sweeps over the partitions, from 1;
    `own_data` is what some of them see in place of `data`.
    """

    source: ModelSource
    report: Report
    target: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data: TokenData | None = None
    output: Destination | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    provenance: dict[str, object] = field(default_factory=dict)
    running: str = ""
    sweep: int = 1
    own_data: dict[int, TokenData] = field(default_factory=dict)
