"""Compilations with GPTQ: better than rounding to nearest, the same every time, and loaded as any other."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

import qcompiler
from passes.calibrate import Calibrate
from qcompiler.data.batches import TokenBatch
from qcompiler.demo import calibration_text, model_path
from qcompiler.ir.graph import Graph, Stage
from qcompiler.pipeline import Pipeline, parse_pipeline
from qcompiler.pipeline.base import Context, PartitionStep, PartitionWork, StreamingPass
from tests.compile.tiny import (
    EVERYWHERE,
    INT4,
    INT8,
    SHORT,
    pipeline,
    rule,
    same,
    save_tiny,
    stored,
    timeless,
    tiny_model,
    token_rows,
)

PIPELINE = """
name: test
passes:
  - assign:
      rules:
        - {select: {structure: mlp-output}, scheme: {weights: {type: int, bits: 8, group_size: 128}}, solver: SOLVER}
        - {select: {structure: [attention-input, attention-output]}, scheme: W4A16_ASYM, solver: SOLVER,
           transform: TRANSFORM}
        - {select: {structure: mlp-input}, scheme: FP8, solver: SOLVER}
  - legalize
  - insert-observers
  - calibrate: {scales: mse}
  - lower
"""
SAMPLES = qcompiler.CalibrationSpec(dataset=calibration_text(), samples=24, sequence_length=128)


def mixed(solver: str) -> Pipeline:
    """To nearest as it stands, or by GPTQ, with AWQ in attention."""
    return parse_pipeline(
        PIPELINE.replace("SOLVER", solver).replace("TRANSFORM", "awq" if solver == "gptq" else "none")
    )


@dataclass(frozen=True, slots=True)
class Pair:
    """One model by both solvers."""

    nearest: qcompiler.Result
    solved: qcompiler.Result


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("solved")
    made = (
        qcompiler.compile(model_path(), pipeline=mixed(solver), output=folder / solver, calibration=SAMPLES)
        for solver in ("rtn", "gptq")
    )
    return Pair(*made)


def test_every_layer_says_how_it_was_solved_and_what_came_of_it(pair: Pair) -> None:
    rows = [row for row in pair.solved.report.layers if row.scheme]
    assert len(rows) == 28
    for row in rows:
        assert row.solver == "gptq"
        assert (row.damping, row.dead_columns) == (0.01, 0)
        assert 0 < row.output_error < row.nearest_output_error < 0.1  # type: ignore[operator]
    assert all(row.output_error is None for row in pair.nearest.report.layers)


def test_transformers_computes_what_was_solved(pair: Pair) -> None:
    assert qcompiler.verify(pair.solved.output).difference <= torch.finfo(torch.bfloat16).eps


def test_the_text_is_predicted_more_like_the_dense_model(pair: Pair) -> None:
    from qcompiler.demo import evaluation_text

    divergences = []
    for result in (pair.nearest, pair.solved):
        fidelity = qcompiler.verify(
            result.output, reference=model_path(), text=evaluation_text(), sequence_length=128, sequences=48
        ).fidelity
        assert fidelity is not None
        assert fidelity.against is not None
        divergences.append(fidelity.against.kl_mean)
    assert divergences[1] < 0.7 * divergences[0]


def test_the_same_run_gives_the_same_bytes_whatever_the_threads(pair: Pair, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            again = qcompiler.compile(
                model_path(), pipeline=mixed("gptq"), output=tmp_path / str(threads), calibration=SAMPLES
            )
        finally:
            torch.set_num_threads(before)
        for file in sorted(pair.solved.output.iterdir()):
            assert timeless(file) == timeless(again.output / file.name), file.name


def test_hessians_are_of_the_inputs_that_the_model_really_has(tmp_path: Path) -> None:
    seen: dict[str, torch.Tensor] = {}

    @dataclass(frozen=True)
    class Look(StreamingPass):
        name: ClassVar[str] = "look"
        requires: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED})

        def begin(self, graph: Graph, context: Context) -> PartitionStep:
            assert context.data is not None
            batches.extend(context.data.batches)
            return Step()

    class Step(PartitionStep):
        def segment(self, work: PartitionWork) -> None:
            for statistic in work.statistics.hessians.values():
                seen[statistic.observer.consumers[0]] = statistic.value().clone()

    batches: list[TokenBatch] = []
    passes = mixed("gptq").passes
    assert isinstance(passes[3], Calibrate)
    by_layers = replace(passes[3], propagate="layer")  # else attention's outputs are rounded before the MLP
    chosen = Pipeline("look", (*passes[:3], Look(), by_layers, *passes[4:]))
    qcompiler.compile(model_path(), pipeline=chosen, output=tmp_path / "out", calibration=SAMPLES)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path())
    wanted: dict[str, torch.Tensor] = {}
    for path in seen:
        if ".0." in path:  # nothing before the first layer's inputs has been rounded

            def hook(module: object, args: tuple[torch.Tensor, ...], path: str = path) -> None:
                rows = args[0].double().flatten(0, 1)
                wanted[path] = wanted.get(path, 0) + rows.T @ rows

            model.get_submodule(path).register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(batch.input_ids)
    assert len(wanted) == 4
    for path, exact in wanted.items():
        assert (seen[path].double() - exact).norm() <= 1e-4 * exact.norm(), path


def test_dampings_that_grew_and_dead_inputs_are_told(tmp_path: Path) -> None:
    """A Hessian of fewer tokens than channels, and a channel of the first norm that is always zero."""
    model: Any = tiny_model("llama", layers=1, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[7] = 0
    model.save_pretrained(tmp_path / "source")
    chosen = pipeline(rule(EVERYWHERE, INT4, solver={"gptq": {"damping": 1e-9}}))
    result = qcompiler.compile(
        tmp_path / "source", pipeline=chosen, output=tmp_path / "out", calibration=token_rows(1), sampling=SHORT
    )
    rows = {row.path.rpartition(".")[2]: row for row in result.report.layers if row.scheme}
    assert all(row.damping is not None and row.damping > 1e-9 for row in rows.values())
    assert [name for name, row in rows.items() if row.dead_columns] == ["q_proj", "k_proj", "v_proj"]
    notes = [note.text for note in result.report.notes if note.kind == "fallback"]
    told = [
        re.fullmatch(
            r"gptq: damping (\S+) for \S+?(?: and (\d+) more)?, where 1e-09 was asked for: with less, the Hessian of "
            "their inputs is not positive definite",
            text,
        )
        for text in notes
    ]
    grown = Counter(f"{row.damping:g}" for row in rows.values())
    assert {found.group(1): 1 + int(found.group(2) or 0) for found in told if found} == grown
    assert len(told) == len(grown)


def test_a_change_of_the_batches_changes_no_scale_and_few_codes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", "llama", layers=1)
    made = []
    for tokens in (64, 512):
        sampling = SHORT.model_copy(update={"batch_tokens": tokens})
        result = qcompiler.compile(
            tmp_path / "source",
            pipeline=pipeline(rule(EVERYWHERE, INT8, solver="gptq")),
            output=tmp_path / str(tokens),
            calibration=token_rows(16),
            sampling=sampling,
        )
        made.append(stored(result.output))
    one, other = made
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        if key.endswith("weight_packed"):
            codes = [found[key].view(torch.uint8) for found in made]
            assert (codes[0] != codes[1]).float().mean() < 0.02, key
        else:
            assert same(tensor, other[key]), key
