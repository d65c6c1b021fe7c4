"""Passes run in order, each timed and its graph verified; streaming passes that follow each other are one sweep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from passes.assign import Assign
from passes.legalize import Legalize
from qcompiler.capture import capture_graph
from qcompiler.errors import ConfigError, QCompilerError, VerificationError
from qcompiler.ir.annotations import Quant, set_quant
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.partition import partitions
from qcompiler.pipeline import Context, GraphPass, PartitionStep, PartitionWork, Pass, Pipeline, StreamingPass
from qcompiler.pipeline.manager import prepare_streaming_passes, run_graph_passes, run_streaming_passes, sweeps
from qcompiler.pipeline.pipeline import load_pipeline
from qcompiler.report import Report
from qcompiler.source import ModelSource, open_model
from tests.compile.tiny import save_tiny

Log = list[str]


@dataclass(frozen=True, kw_only=True)
class Note(GraphPass):
    """Writes down that it ran."""

    name: ClassVar[str] = "note"
    requires: ClassVar[frozenset[Stage]] = frozenset(Stage)
    log: Log = field(default_factory=list)

    def run(self, graph: Graph, context: Context) -> None:
        self.log.append("note")


@dataclass(frozen=True, kw_only=True)
class Watch(StreamingPass):
    """Writes down what it is called for, with the weights that it was given; fails at a partition if told to."""

    name: ClassVar[str] = "watch"
    requires: ClassVar[frozenset[Stage]] = frozenset(Stage)
    who: str = "watch"
    log: Log = field(default_factory=list)
    fails_at: str | None = None

    def begin(self, graph: Graph, context: Context) -> PartitionStep:
        self.log.append(f"{self.who} begins")
        return _Watching(self)


@dataclass(frozen=True, kw_only=True)
class Look(Watch):
    """Another pass that does the same: a pass that comes again begins a sweep of its own."""

    name: ClassVar[str] = "look"


class _Watching(PartitionStep):
    def __init__(self, options: Watch) -> None:
        self._options = options

    def partition(self, work: PartitionWork) -> None:
        name, log = work.partition.name, self._options.log
        if name == self._options.fails_at:
            raise KeyboardInterrupt
        assert all(weight.device == torch.device("cpu") for weight in work.weights.values())
        log.append(f"{self._options.who}: {name}")

    def finish(self) -> None:
        self._options.log.append(f"{self._options.who} ends")

    def abort(self) -> None:
        self._options.log.append(f"{self._options.who} is undone")


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelSource, Graph]]:
    """A tiny model with weights, and its graph, which tests must not change."""
    with ExitStack() as stack:
        source = stack.enter_context(open_model(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")))
        yield source, capture_graph(source.model)


@pytest.fixture
def graph(opened: tuple[ModelSource, Graph]) -> Graph:
    return replace(opened[1], fx=copy.deepcopy(opened[1].fx))


@pytest.fixture
def context(opened: tuple[ModelSource, Graph]) -> Context:
    return Context(opened[0], Report())


def pipeline(*items: Pass | Pipeline) -> Pipeline:
    return Pipeline("p", items)


def every_linear() -> Assign:
    """In FP8, but for the head."""
    options = {"rules": [{"select": {"name": "*"}, "scheme": "FP8_DYNAMIC"}], "ignore": [{"structure": "lm-head"}]}
    (item,) = load_pipeline([Assign(**options)]).flat()  # type: ignore[arg-type]
    assert isinstance(item, Assign)
    return item


def test_graph_passes_run_in_order_and_each_is_timed_and_shown(graph: Graph, context: Context) -> None:
    seen: list[tuple[str, Stage]] = []
    items = pipeline(Note(), Pipeline("inner", (every_linear(), Legalize())), Note())
    run_graph_passes(graph, items, context, show=lambda name, graph: seen.append((name, graph.stage)))
    assert seen == [
        ("note", Stage.CAPTURED),
        ("assign", Stage.ANNOTATED),
        ("legalize", Stage.ANNOTATED),
        ("note", Stage.ANNOTATED),
    ]
    assert [timing.name for timing in context.report.timings] == [name for name, _ in seen]
    assert all(timing.seconds >= 0 for timing in context.report.timings)


def test_a_plan_ends_at_the_first_pass_that_needs_weights(graph: Graph, context: Context) -> None:
    log: Log = []
    items = pipeline(Note(log=log), Watch(log=log), Note(log=log))
    run_graph_passes(graph, items, context)
    prepare_streaming_passes(graph, items, context)
    assert log == ["note"]
    run_streaming_passes(graph, pipeline(Note(log=log), Note(log=log)), context)
    assert log == ["note"], "what a plan ran does not run again"


def spoil_because(graph: Graph) -> None:
    node, _ = next(graph.linears())
    set_quant(node, Quant(None, "none", ()))


def spoil_order(graph: Graph) -> None:
    node, _ = next(graph.linears())
    graph.nodes[-2].append(node)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_because, "breaks rule no-quant at %l0.self_attn.q_proj (module model.layers.0.self_attn.q_proj)"),
        (spoil_order, "breaks rule reads-earlier-nodes at "),
    ],
)
def test_a_pass_that_leaves_an_illegal_graph_is_named(
    spoil: Callable[[Graph], None], said: str, graph: Graph, context: Context
) -> None:
    @dataclass(frozen=True)
    class Spoil(GraphPass):
        name: ClassVar[str] = "spoil"
        requires: ClassVar[frozenset[Stage]] = frozenset(Stage)

        def run(self, graph: Graph, context: Context) -> None:
            spoil(graph)

    log: Log = []
    with pytest.raises(VerificationError) as raised:
        run_graph_passes(graph, pipeline(Spoil(), Note(log=log)), context)
    assert raised.value.message.startswith(f"after spoil, the captured graph {said}")
    assert "\n  > %" in raised.value.message
    assert log == [], "the next pass never sees it"


def test_streaming_passes_that_follow_each_other_are_one_sweep(graph: Graph, context: Context) -> None:
    log: Log = []
    progress: Log = []
    context.progress = lambda what, done, total: progress.append(f"{what} {done}/{total}")
    run_streaming_passes(graph, pipeline(Watch(who="a", log=log), Look(who="b", log=log)), context)
    names = [part.name for part in partitions(graph)]
    assert names == ["inputs", "layer 0", "layer 1", "outputs"]
    sweep = [f"{who}: {name}" for name in names for who in "ab"]
    assert log == ["a begins", "b begins", *sweep, "a ends", "b ends"]
    assert progress == [*(f"{name} {n}/4" for n, name in enumerate(names)), "done 4/4"]


def test_a_graph_pass_between_them_makes_them_two(graph: Graph, context: Context) -> None:
    log: Log = []
    items = (Watch(who="a", log=log), Pipeline("inner", (Note(log=log), Watch(who="b", log=log))), Note(log=log))
    run_streaming_passes(graph, pipeline(*items), context)
    told = [line for line in log if ":" not in line]
    assert told == ["a begins", "a ends", "note", "b begins", "b ends", "note"]
    assert [t.name for t in context.report.timings if t.name in ("watch", "note")] == ["watch", "note"] * 2


def test_a_pass_that_comes_again_begins_a_sweep_of_its_own(graph: Graph, context: Context) -> None:
    log: Log = []
    items = (Watch(who="a", log=log), Look(who="b", log=log), Watch(who="c", log=log))
    assert sweeps(pipeline(*items)) == [[*items[:2]], [items[2]]]
    run_streaming_passes(graph, pipeline(*items), context)
    told = [line for line in log if ":" not in line]
    assert told == ["a begins", "b begins", "a ends", "b ends", "c begins", "c ends"]
    assert log.index("c begins") > log.index("b: outputs")


def test_whatever_ends_a_later_sweep_steps_of_earlier_ones_are_undone(graph: Graph, context: Context) -> None:
    log: Log = []
    items = pipeline(Watch(who="a", log=log), Watch(who="b", log=log, fails_at="layer 0"))
    with pytest.raises(KeyboardInterrupt):
        run_streaming_passes(graph, items, context)
    assert log[-3:] == ["b: inputs", "a is undone", "b is undone"]


def test_time_in_a_sweep_is_told_per_pass_and_per_part(graph: Graph, context: Context) -> None:
    shown: Log = []
    run_streaming_passes(graph, pipeline(Watch(), Look()), context, show=lambda name, graph: shown.append(name))
    assert shown == ["watch", "look"]
    assert [timing.name for timing in context.report.timings] == ["watch", "look", "load"]


@pytest.mark.parametrize("at", ["inputs", "layer 1", "outputs"])
def test_whatever_ends_a_sweep_every_step_is_undone(at: str, graph: Graph, context: Context) -> None:
    log: Log = []
    items = pipeline(Watch(who="a", log=log), Look(who="b", log=log, fails_at=at), Note(log=log))
    with pytest.raises(KeyboardInterrupt):
        run_streaming_passes(graph, items, context)
    assert log[-3:] == [f"a: {at}", "a is undone", "b is undone"]


def test_a_step_that_cannot_begin_undoes_those_that_have(graph: Graph, context: Context) -> None:
    @dataclass(frozen=True)
    class Refuse(StreamingPass):
        name: ClassVar[str] = "refuse"
        requires: ClassVar[frozenset[Stage]] = frozenset(Stage)

        def begin(self, graph: Graph, context: Context) -> PartitionStep:
            raise QCompilerError("no")

    log: Log = []
    with pytest.raises(QCompilerError, match="no"):
        run_streaming_passes(graph, pipeline(Watch(who="a", log=log), Refuse()), context)
    assert log == ["a begins", "a is undone"]


def test_a_step_that_would_do_nothing_is_refused(graph: Graph, context: Context) -> None:
    class Misspelt(PartitionStep):
        def partitions(self, work: PartitionWork) -> None:
            raise AssertionError

    @dataclass(frozen=True)
    class Idle(StreamingPass):
        name: ClassVar[str] = "idle"
        requires: ClassVar[frozenset[Stage]] = frozenset(Stage)

        def begin(self, graph: Graph, context: Context) -> PartitionStep:
            return Misspelt()

    log: Log = []
    with pytest.raises(ConfigError, match=r"pass idle: its step, a .*Misspelt, does nothing: it defines no segment, "):
        run_streaming_passes(graph, pipeline(Watch(who="a", log=log), Idle()), context)
    assert log == ["a begins", "a is undone"]


def test_a_sweep_that_leaves_an_illegal_graph_is_undone(graph: Graph, context: Context) -> None:
    @dataclass(frozen=True)
    class Overstate(Watch):
        name: ClassVar[str] = "overstate"
        ensures: ClassVar[Stage] = Stage.LOWERED

    run_graph_passes(graph, pipeline(every_linear()), context)
    log: Log = []
    with pytest.raises(VerificationError, match="after overstate, the lowered graph breaks rule linears-lowered at "):
        run_streaming_passes(graph, pipeline(Watch(who="a", log=log), Overstate(who="b", log=log)), context)
    assert log[-4:] == ["a ends", "b ends", "a is undone", "b is undone"]


def test_graph_passes_read_no_weight(graph: Graph, tmp_path: Path) -> None:
    nowhere = Context(ModelSource(tmp_path, graph.model.config, graph.model), Report())
    run_graph_passes(graph, pipeline(every_linear(), Legalize()), nowhere)
    assert graph.stage is Stage.ANNOTATED
