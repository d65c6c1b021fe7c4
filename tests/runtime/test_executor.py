"""The streaming executor: what observers see is what flows through the model, quantized as far as it is compiled."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import qcompiler
from qcompiler import CalibrationSpec
from qcompiler.data import TokenData, load_calibration
from qcompiler.demo import calibration_text, model_path
from qcompiler.errors import DataError
from qcompiler.numerics import fake_quantize
from qcompiler.pipeline import Context, PartitionStep, PartitionWork
from qcompiler.report import Report
from qcompiler.runtime.executor import sweep
from qcompiler.runtime.statistics import Statistic
from qcompiler.source import open_model
from tests.compile.tiny import (
    ATTENTION,
    EVERYWHERE,
    MLP,
    pipeline,
    rule,
    save_tiny,
    stored,
    token_rows,
)

LAYER_0 = {"layers": 0}
INT8_INPUTS = {
    "weights": {"type": "int", "bits": 8, "strategy": "channel"},
    "input_activations": {"type": "int", "bits": 8, "strategy": "tensor"},
}
COARSE = {
    "weights": {"type": "int", "bits": 3, "group_size": 16},
    "input_activations": {"type": "int", "bits": 4, "dynamic": True},
}
"""A scheme that changes much of what comes after it."""


@dataclass
class Recorder(PartitionStep):
    """A step that solves nothing: what later partitions see is what the dense model computes."""

    parts: list[str] = field(default_factory=list)
    weights: list[set[str]] = field(default_factory=list)
    statistics: dict[str, Statistic] = field(default_factory=dict)

    def partition(self, work: PartitionWork) -> None:
        self.parts.append(work.partition.name)
        self.weights.append(set(work.weights))
        for statistic in work.statistics.ranges.values():
            kind = statistic.observer.purpose
            for path in statistic.observer.consumers:
                self.statistics[path if kind == "input" else f"{path}.{kind}"] = statistic


def record(folder: Path, pipeline_: Any, data: TokenData | None) -> Recorder:
    """Sweep over a model without solving anything."""
    planned = qcompiler.plan(folder, pipeline_)
    recorder = Recorder()
    with open_model(folder) as source:
        sweep(planned.graph, [recorder], Context(source, Report(), data=data))
    return recorder


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def linear_inputs(model: PreTrainedModel, data: TokenData) -> dict[str, list[Tensor]]:
    """The real tokens that enter each linear of a model, batch by batch, as hooks see them."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def hook(path: str, mask: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen[path].append(args[0][mask])

    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    with torch.inference_mode():
        for batch in data.batches:
            handles = [module.register_forward_pre_hook(hook(path, batch.token_mask)) for path, module in linears]
            model(input_ids=batch.input_ids, use_cache=False)
            for handle in handles:
                handle.remove()
    return seen


def spread(values: list[Tensor]) -> tuple[float, float]:
    whole = torch.cat([value.flatten(0, -2) for value in values]).float()
    return min(float(whole.min()), 0.0), max(float(whole.max()), 0.0)


def range_of(statistic: Statistic) -> tuple[float, float]:
    low, high = statistic.range()
    return float(low), float(high)


@pytest.fixture(scope="module")
def ragged() -> TokenData:
    """Sequences of several lengths, in batches of several shapes, with padding."""
    lengths = (31, 30, 24, 23, 17, 16, 16, 9, 3)
    rows = [token_rows(1, length, seed=length + 100 * i)[0] for i, length in enumerate(lengths)]
    spec = CalibrationSpec(sequence_length=31, samples=9, batch_tokens=64, shuffle=False)
    data = load_calibration(spec, None, vocab_size=320, rows=rows)
    assert len({batch.input_ids.shape for batch in data.batches}) > 2
    assert any(not bool(batch.token_mask.all()) for batch in data.batches)
    return data


@pytest.fixture(scope="module", params=["llama", "gemma2", "phi"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain layers; sliding windows beside full attention, and softcaps; parallel blocks."""
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param, dtype=torch.float32)


@pytest.fixture(scope="module")
def recorded(family: Path, ragged: TokenData) -> Recorder:
    """What is seen where every linear's input is observed."""
    return record(family, pipeline(rule(EVERYWHERE, INT8_INPUTS)), ragged)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama", dtype=torch.float32)


def rows_of(data: TokenData) -> list[list[int]]:
    return [
        ids[mask].tolist()
        for batch in data.batches
        for ids, mask in zip(batch.input_ids, batch.token_mask, strict=True)
    ]


# --- collecting -----------------------------------------------------------------------------------------------------


def test_observers_see_what_enters_the_linears_of_the_dense_model(
    family: Path, recorded: Recorder, ragged: TokenData
) -> None:
    hooked = linear_inputs(loaded(family), ragged)
    assert len(recorded.statistics) >= 12
    for path, statistic in recorded.statistics.items():
        assert statistic.tokens == ragged.tokens
        assert range_of(statistic) == spread(hooked[path]), path


def test_padding_and_batching_change_nothing(family: Path, recorded: Recorder, ragged: TokenData) -> None:
    """Against every sequence alone: equal but for the rounding of other matrix shapes."""
    spec = CalibrationSpec(sequence_length=31, samples=9, batch_tokens=1, shuffle=False)
    one_by_one = load_calibration(spec, None, vocab_size=320, rows=rows_of(ragged))
    assert len(one_by_one.batches) == 9
    hooked = linear_inputs(loaded(family), one_by_one)
    for path, statistic in recorded.statistics.items():
        assert range_of(statistic) == pytest.approx(spread(hooked[path]), rel=1e-4)


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_observers_see_the_keys_and_values_that_enter_the_cache(
    strategy: str, ragged: TokenData, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", "mistral", dtype=torch.float32)  # two heads of keys for four of queries
    recorded = record(folder, pipeline(rule(MLP, "FP8_DYNAMIC"), kv_cache={"strategy": strategy}), ragged)
    seen: dict[str, list[Tensor]] = defaultdict(list)
    model = loaded(folder)
    with torch.inference_mode():
        for batch in ragged.batches:
            cache = DynamicCache()  # without the config it drops nothing beyond a window
            model(input_ids=batch.input_ids, past_key_values=cache)
            for index, layer in enumerate(cache.layers):
                for kind, states in (("key", layer.keys), ("value", layer.values)):
                    seen[f"model.layers.{index}.self_attn.{kind}"].append(states.transpose(1, 2)[batch.token_mask])
    assert recorded.statistics.keys() == seen.keys()
    for name, values in seen.items():
        states = torch.cat(values)  # [tokens, heads, head size]
        low, high = recorded.statistics[name].range()
        over = (0, 2) if strategy == "attn_head" else (0, 1, 2)
        assert torch.equal(low, states.amin(over).clamp_max(0))
        assert torch.equal(high, states.amax(over).clamp_min(0))


def test_clipped_ranges_of_real_activations_reduce_the_error_they_promise() -> None:
    """On the bundled model's text: least error loses least, a percentile clips what it says."""
    spec = CalibrationSpec(dataset=calibration_text(), samples=8, sequence_length=128)
    data = load_calibration(spec, model_path(), vocab_size=2048)
    structures = {"structure": ["attention-output", "mlp-output"]}
    by_kind = {
        kind: record(
            model_path(),
            pipeline(rule(structures, INT8_INPUTS), observers={"inputs": kind, "percentile": 99.9}),
            data,
        ).statistics
        for kind in ("minmax", "mse", "percentile")
    }
    hooked = linear_inputs(loaded(model_path()), data)
    totals = dict.fromkeys(by_kind, 0.0)
    for path in by_kind["minmax"]:
        x = torch.cat(hooked[path]).float()
        errors = {}
        for kind, statistics in by_kind.items():
            scale, _ = statistics[path].qparams(torch.float32)
            rounded = fake_quantize(x[None], statistics[path].observer.spec, scale=scale)[0]
            errors[kind] = float((rounded - x).square().sum() / x.square().sum())
            totals[kind] += errors[kind]
        assert errors["mse"] <= 1.001 * errors["minmax"]
        low, high = by_kind["percentile"][path].range()
        outside = float(((x < low) | (x > high)).float().mean())
        assert outside == pytest.approx(2 * 0.001, rel=0.35)
    assert totals["mse"] < 0.9 * totals["minmax"]
    assert totals["mse"] < totals["percentile"]


# --- sweeping -------------------------------------------------------------------------------------------------------


def test_each_partition_has_its_own_weights_and_no_others(llama: Path) -> None:
    recorded = record(llama, pipeline(rule(MLP, "FP8_DYNAMIC")), None)
    assert recorded.parts == ["inputs", "layer 0", "layer 1", "outputs"]
    for index, weights in enumerate(recorded.weights[1:-1]):
        assert weights
        assert all(f".layers.{index}." in path or not path.startswith("model.layers") for path in weights)
    layers = [path for weights in recorded.weights for path in weights if ".layers." in path]
    assert len(layers) == len(set(layers))


@dataclass
class Holder(Recorder):
    """Asks for every weight, and looks which of the earlier partitions' are still there."""

    seen: list[weakref.ref[Tensor]] = field(default_factory=list)
    alive: int = 0

    def partition(self, work: PartitionWork) -> None:
        self.alive += sum(reference() is not None for reference in self.seen)
        super().partition(work)
        # Buffers belong to the graph, and are held as long as it is.
        self.seen += [weakref.ref(tensor) for path, tensor in work.weights.items() if path.endswith(".weight")]


def test_the_weights_of_a_partition_are_gone_before_the_next(llama: Path, ragged: TokenData) -> None:
    planned = qcompiler.plan(llama, pipeline(rule(EVERYWHERE, "FP8")))
    holder = Holder()
    with open_model(llama) as source:
        sweep(planned.graph, [holder], Context(source, Report(), data=ragged))
    assert len(holder.seen) > 18
    assert holder.alive == 0


def test_nothing_runs_where_nothing_is_observed(llama: Path) -> None:
    assert not record(llama, pipeline(rule(EVERYWHERE, "FP8_DYNAMIC")), None).statistics
    with pytest.raises(DataError, match="no calibration data was loaded"):
        record(llama, pipeline(rule(MLP, "FP8")), None)


def test_nothing_runs_after_the_last_observer(tmp_path: Path, ragged: TokenData, monkeypatch: Any) -> None:
    """Statistics of the first layer alone need no other layer's arithmetic."""
    from qcompiler.runtime import stream

    folder = save_tiny(tmp_path / "model", "llama", layers=3)
    ran: list[str] = []
    evaluate = stream.evaluate

    def counting(nodes: Any, *args: Any, **kwargs: Any) -> Any:
        nodes = list(nodes)
        ran.extend(str(node.target) for node in nodes if node.op == "call_module")
        return evaluate(nodes, *args, **kwargs)

    monkeypatch.setattr(stream, "evaluate", counting)
    record(folder, pipeline(rule({**LAYER_0, "structure": "attention-output"}, "FP8")), ragged)
    modules = set(ran)
    assert "model.layers.0.self_attn.v_proj" in modules
    assert not modules & {"model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"}
    assert not any(".layers.1." in path or "lm_head" in path for path in modules)


# --- propagating ----------------------------------------------------------------------------------------------------


def input_scales(folder: Path) -> dict[str, float]:
    return {
        key.removesuffix(".input_scale"): float(tensor)
        for key, tensor in stored(folder).items()
        if key.endswith(".input_scale")
    }


def test_statistics_of_a_layer_are_those_after_the_quantized_ones_before_it(
    llama: Path, tmp_path: Path, ragged: TokenData
) -> None:
    """The oracle is the compiled checkpoint in Transformers, whose first layer is as coarse as it was compiled."""
    static = rule({**EVERYWHERE, "layers": 1}, "FP8")
    first_coarse = rule({**EVERYWHERE, **LAYER_0}, COARSE)
    sampling = CalibrationSpec(sequence_length=31, samples=9, batch_tokens=64, shuffle=False)
    coarse, dense = (
        qcompiler.compile(
            llama,
            pipeline=pipeline(*rules),
            output=tmp_path / name,
            calibration=rows_of(ragged),
            sampling=sampling,
        )
        for name, rules in (("coarse", (first_coarse, static)), ("dense", (static,)))
    )

    def first_linears(folder: Path) -> dict[str, float]:
        """The scales of what enters layer 1: within a layer, statistics are those of its dense weights."""
        hooked = linear_inputs(loaded(folder), ragged)
        paths = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
        return {path: max(map(abs, spread(hooked[path]))) / 448 for path in paths}

    for compiled in (coarse, dense):
        expected, found = first_linears(compiled.output), input_scales(compiled.output)
        assert {path: found[path] for path in expected} == pytest.approx(expected, rel=1e-5)
    difference = {
        path: abs(scale / input_scales(dense.output)[path] - 1) for path, scale in input_scales(coarse.output).items()
    }
    assert max(difference.values()) > 0.02


@pytest.mark.parametrize("propagate", [True, "layer"])
def test_within_a_layer_statistics_are_those_after_rounded_weights_or_dense_ones(
    propagate: bool | str, llama: Path, tmp_path: Path
) -> None:
    rows = [row["input_ids"] for row in token_rows(4)]
    sampling = CalibrationSpec(sequence_length=32, samples=4, shuffle=False)
    data = load_calibration(sampling, None, vocab_size=320, rows=rows)
    result = qcompiler.compile(
        llama,
        pipeline=pipeline(
            rule({**ATTENTION, **LAYER_0}, "FP8"), rule({**MLP, **LAYER_0}, "FP8"), runs=({"propagate": propagate},)
        ),
        output=tmp_path / "output",
        calibration=rows,
        sampling=sampling,
    )
    seen = {way: linear_inputs(loaded(folder), data) for way, folder in ((True, result.output), ("layer", llama))}
    expected = {
        way: {path: max(map(abs, spread(hooked[path]))) / 448 for path in input_scales(result.output)}
        for way, hooked in seen.items()
    }
    assert input_scales(result.output) == pytest.approx(expected[propagate], rel=1e-5)
    assert expected[True] != pytest.approx(expected["layer"], rel=1e-3)
    assert len(input_scales(result.output)) == 7
