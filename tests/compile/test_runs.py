"""Several runs over the data in one compilation, and runs in which later layers see dense activations."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import qcompiler
from passes.calibrate import Calibrate
from qcompiler import CalibrationSpec, Pipeline, Result
from qcompiler.runtime.stream import Stream
from tests.compile.tiny import (
    ATTENTION,
    INT4,
    INT4_ASYM,
    MLP,
    pipeline,
    provenance,
    rule,
    same,
    save_tiny,
    stored,
    token_rows,
)

IN_ORDER = CalibrationSpec(sequence_length=64, shuffle=False)
ROWS, OTHERS = token_rows(8, 64), token_rows(8, 64, seed=1)
FIRST = rule(ATTENTION, INT4_ASYM, transform="awq")
SECOND = rule(MLP, INT4, solver="gptq")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("runs") / "source", "llama")


def compiled(
    source: Path, output: Path, chosen: Pipeline, rows: list[dict[str, list[int]]] = ROWS, **options: Any
) -> Result:
    return qcompiler.compile(source, pipeline=chosen, output=output, calibration=rows, sampling=IN_ORDER, **options)


def differing(one: Path, other: Path, part: str) -> set[str]:
    """The tensors with `part` in their names that differ; both have the same ones."""
    a, b = ({key: tensor for key, tensor in stored(folder).items() if part in key} for folder in (one, other))
    assert a.keys() == b.keys()
    assert a
    return {key for key in a if not same(a[key], b[key])}


def dense_again(folder: Path, like: Path, output: Path) -> Path:
    """A checkpoint as Transformers decompresses it, saved as a dense model."""
    client: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        client(torch.arange(3, 9)[None])  # the first run decompresses
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(like, dtype="auto")
    found: dict[str, Tensor] = client.state_dict()
    model.load_state_dict({key: found[key] for key in model.state_dict()})
    model.save_pretrained(output)
    return output


# --- two runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(source: Path) -> Result:
    """AWQ in attention, then GPTQ in MLPs, on other data. The output's parent is made on the way."""
    file = source.parent / "others.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in OTHERS))
    own = IN_ORDER.model_copy(update={"dataset": file})
    runs = ({"algorithms": ("awq",)}, {"algorithms": ("gptq",), "calibration": own})
    return compiled(source, source.parent / "new" / "two", pipeline(FIRST, SECOND, runs=runs))


@pytest.fixture(scope="module")
def first_alone(source: Path) -> Path:
    return compiled(source, source.parent / "first", pipeline(FIRST)).output


def test_what_the_first_run_makes_is_what_it_makes_alone(two: Result, first_alone: Path) -> None:
    for part in ("self_attn", "norm", "embed_tokens", "lm_head"):
        assert not differing(two.output, first_alone, part), part


def test_the_second_run_starts_from_the_model_that_the_first_left(
    source: Path, two: Result, first_alone: Path, tmp_path: Path
) -> None:
    left = dense_again(first_alone, source, tmp_path / "left")
    alone = compiled(left, tmp_path / "alone", pipeline(SECOND), OTHERS).output
    assert not differing(two.output, alone, "mlp")
    elsewhere = compiled(left, tmp_path / "elsewhere", pipeline(SECOND), ROWS).output
    assert "model.layers.0.mlp.gate_proj.weight_packed" in differing(two.output, elsewhere, "mlp")


def test_each_runs_data_is_remembered(two: Result, first_alone: Path) -> None:
    used = provenance(two.output)["calibration"]
    alone = provenance(first_alone)["calibration"]
    assert {key: used[key] for key in alone} == alone
    assert used["run 2"]["tokens"] == 512
    assert used["run 2"]["fingerprint"] != used["fingerprint"]


def test_transformers_computes_what_two_runs_made(two: Result) -> None:
    assert qcompiler.verify(two.output).difference == 0


def test_what_runs_left_for_one_another_is_gone(two: Result) -> None:
    assert [path.name for path in two.output.parent.iterdir()] == ["two"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_what_runs_left_for_one_another_is_gone_after_a_failure(
    kind: type[BaseException], source: Path, tmp_path: Path
) -> None:
    seen: list[Path] = []
    calls: Counter[str] = Counter()

    def stop(what: str, done: int, total: int) -> None:
        calls[what] += 1
        if calls["layer 1"] == 2:  # in the second run
            seen.extend((tmp_path / ".out.sweeps").iterdir())
            raise kind("stop here")

    runs = ({"select": (ATTENTION,)}, {})
    chosen = pipeline(rule(ATTENTION, INT4), rule(MLP, INT4), runs=runs)
    with pytest.raises(kind, match="stop here"):
        qcompiler.compile(source, pipeline=chosen, output=tmp_path / "out", progress=stop)
    assert len(seen) >= 2
    assert not list(tmp_path.iterdir())


def test_a_run_that_measures_nothing_needs_no_data(source: Path, tmp_path: Path) -> None:
    """Only the others are asked for some."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    own = IN_ORDER.model_copy(update={"dataset": file})
    runs = ({"algorithms": ("rtn",)}, {"algorithms": ("gptq",), "calibration": own})
    chosen = pipeline(rule(ATTENTION, INT4), SECOND, runs=runs)
    result = qcompiler.compile(source, pipeline=chosen, output=tmp_path / "out")
    assert provenance(result.output)["calibration"].keys() == {"run 2"}


@pytest.mark.parametrize(
    ("rules", "runs"), [((FIRST, SECOND), [("awq",), ()]), ((SECOND,), [()])], ids=["two are left", "one is left"]
)
def test_an_algorithm_that_no_linear_has_gets_no_run_of_its_own(
    rules: tuple[dict[str, Any], ...], runs: list[tuple[str, ...]], source: Path
) -> None:
    idle = rule({"structure": "experts"}, INT4, transform="smoothquant", optional=True)
    planned = qcompiler.plan(source, pipeline(idle, *rules), independent=True)
    assert [item.algorithms for item in planned.pipeline.flat() if isinstance(item, Calibrate)] == runs
    said = "no linear is solved by smoothquant, which rules name: no run is made for it"
    assert said in [note.text for note in planned.report.notes]


# --- propagate --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counted:
    """A compilation, and how often each partition, or segment of one, was run over the batches."""

    output: Path
    forward: Counter[str]
    timings: set[str]


COARSE = rule(ATTENTION, {"weights": {"type": "int", "bits": 3, "group_size": 16}})
RULES = (COARSE, SECOND)


@pytest.fixture(scope="module")
def propagated(source: Path) -> dict[bool | str, Counted]:
    """Coarse attention and MLPs by GPTQ, with propagation everywhere, from layer to layer, and without."""
    found: dict[bool | str, Counted] = {}
    run = Stream.run
    for propagate in (True, "layer", False):
        forward: Counter[str] = Counter()

        def counting(self: Stream, part: Any, *args: Any, forward: Counter[str] = forward, **options: Any) -> None:
            forward[part.name] += 1
            run(self, part, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stream, "run", counting)
            chosen = pipeline(*RULES, runs=({"propagate": propagate},))
            result = compiled(source, source.parent / f"propagate-{propagate}", chosen)
        found[propagate] = Counted(result.output, forward, {timing.name for timing in result.report.timings})
    return found


def test_without_propagation_later_layers_see_what_the_dense_model_computes(
    source: Path, propagated: dict[bool | str, Counted], tmp_path: Path
) -> None:
    alone = compiled(source, tmp_path / "alone", pipeline(SECOND, runs=({"propagate": False},))).output
    assert not differing(propagated[False].output, alone, "mlp")
    for way, layers in ((True, {"0", "1"}), ("layer", {"1"})):
        assert not differing(propagated[False].output, propagated[way].output, "self_attn")  # rounded without data
        changed = differing(propagated[False].output, propagated[way].output, "mlp")
        assert {name.split(".")[2] for name in changed} == layers


def test_by_layers_later_layers_see_what_earlier_ones_became(
    source: Path, propagated: dict[bool | str, Counted], tmp_path: Path
) -> None:
    """The second layer's MLP is that of a model whose first layer was rounded before."""
    by_layers: dict[str, Any] = {"propagate": "layer"}
    first = pipeline(
        *(rule({**r["select"], "layers": 0}, r["scheme"], solver=r.get("solver", "rtn")) for r in RULES),
        runs=(by_layers,),
    )
    left = dense_again(compiled(source, tmp_path / "first", first).output, source, tmp_path / "left")
    second = pipeline(rule({**MLP, "layers": 1}, INT4, solver="gptq"), runs=(by_layers,))
    alone = compiled(left, tmp_path / "alone", second).output
    assert not differing(propagated["layer"].output, alone, "layers.1.mlp")


def test_with_propagation_every_linear_sees_what_those_before_it_became(
    source: Path, propagated: dict[bool | str, Counted], tmp_path: Path
) -> None:
    """Each one's oracle is a model in which all that comes before it was rounded before."""
    steps = (
        (rule({**ATTENTION, "layers": 0}, COARSE["scheme"]), "layers.0.self_attn"),
        (rule({"structure": "mlp-input", "layers": 0}, INT4, solver="gptq"), "layers.0.mlp.gate_proj"),
        (rule({"structure": "mlp-output", "layers": 0}, INT4, solver="gptq"), "layers.0.mlp.down_proj"),
        (rule({**ATTENTION, "layers": 1}, COARSE["scheme"]), "layers.1.self_attn"),
        (rule({"structure": "mlp-input", "layers": 1}, INT4, solver="gptq"), "layers.1.mlp.up_proj"),
        (rule({"structure": "mlp-output", "layers": 1}, INT4, solver="gptq"), "layers.1.mlp.down_proj"),
    )
    left = source
    for number, (one, name) in enumerate(steps):
        alone = compiled(left, tmp_path / f"step-{number}", pipeline(one)).output
        assert not differing(propagated[True].output, alone, name), name
        left = dense_again(alone, left, tmp_path / f"left-{number}")


def test_propagation_costs_one_run_of_each_partition_or_none(propagated: dict[bool | str, Counted]) -> None:
    """A segment is run up to its observers, which is little, and once through; a whole layer is run twice."""
    runs = {1: 1, 2: 2, 3: 2}  # nothing is observed in the first, which is rounded without data
    segments = {f"layer {layer}, segment {segment}": count for layer in (0, 1) for segment, count in runs.items()}
    assert propagated[True].forward == {"inputs": 1, **segments, "layer 1, segment 3": 1}
    assert propagated["layer"].forward == {"inputs": 1, "layer 0": 2, "layer 1": 1}
    assert propagated[False].forward == {"inputs": 1, "layer 0": 1, "layer 1": 1}
    assert "forward: propagate" in propagated[True].timings
    assert "forward: propagate" not in propagated[False].timings


# --- a layer that several partitions run -----------------------------------------------------------------------------


def test_without_propagation_a_layer_that_is_run_again_is_seen_dense_until_the_next_run(tmp_path: Path) -> None:
    """The low module runs twice before the high one, whose codes tell what it saw."""
    source = save_tiny(tmp_path / "source", "hrm_text", H_cycles=1, L_cycles=2, num_layers_per_stack=1)
    low = rule({"name": "*L_module*down_proj"}, {"weights": {"type": "int", "bits": 2, "group_size": 16}})
    high = rule({"name": "*H_module*down_proj"}, INT4, solver="gptq")
    dense: dict[str, Any] = {"propagate": False}
    alone, together, later = (
        compiled(source, tmp_path / name, pipeline(*rules, runs=runs), ROWS[:2]).output
        for name, rules, runs in (
            ("alone", (high,), (dense,)),
            ("together", (low, high), (dense,)),
            ("later", (low, high), ({"select": [{"name": "*L_module*"}], **dense}, dense)),
        )
    )
    solved = "model.H_module.layers.0.mlp.down_proj.weight_packed"
    assert torch.equal(stored(alone)[solved], stored(together)[solved])
    assert not torch.equal(stored(alone)[solved], stored(later)[solved])
