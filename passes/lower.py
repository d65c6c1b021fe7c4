"""Pack each partition's weights into a shard, and write the checkpoint's config from the annotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompiler.errors import ConfigError, RuleError
from qcompiler.ir.annotations import AnyObserver, get_quant
from qcompiler.ir.graph import Graph, Stage
from qcompiler.lowering.rewrite import lower_graph
from qcompiler.lowering.write import CheckpointStep
from qcompiler.pipeline import Context, PartitionStep, PartitionWork, StreamingPass


@dataclass(frozen=True, kw_only=True)
class Lower(StreamingPass):
    """Write a compressed-tensors checkpoint, one shard per partition, the index and config last."""

    name: ClassVar[str] = "lower"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CALIBRATED})
    ensures: ClassVar[Stage] = Stage.LOWERED

    format: Literal["compressed-tensors"] = "compressed-tensors"

    def measures(self, graph: Graph, run: int) -> bool:
        return False

    def prepare(self, graph: Graph, context: Context) -> None:
        for node, leaf in graph.linears():
            quant = get_quant(node)
            if quant is not None and quant.scheme is not None and quant.run is None:
                raise RuleError(
                    f"{leaf.path} is to become {quant.scheme.short}, and no calibrate before lower solves it",
                    hint="add a calibrate without select and algorithms, which solves what is left",
                )

    def begin(self, graph: Graph, context: Context) -> PartitionStep:
        if context.output is None:
            raise ConfigError("lower has nowhere to write", hint="pass --output (Python: output=)")
        return _Lower(graph, CheckpointStep(graph, context, context.output))


class _Lower(PartitionStep):
    def __init__(self, graph: Graph, checkpoint: CheckpointStep) -> None:
        self._graph = graph
        self._checkpoint = checkpoint

    def uses(self, observer: AnyObserver) -> bool:
        return False

    def partition(self, work: PartitionWork) -> None:
        self._checkpoint.write(work)

    def finish(self) -> None:
        lower_graph(self._graph)
        self._checkpoint.finish()

    def publish(self) -> None:
        self._checkpoint.publish()

    def abort(self) -> None:
        self._checkpoint.abort()
