"""Every packaged pipeline, end to end on the bundled model, and compressed-tensors as the oracle of what it wrote."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from torch import nn

import qcompiler
from qcompiler import CalibrationSpec, Result
from qcompiler.checkpoints.reader import CheckpointReader
from qcompiler.demo import calibration_text, model_path
from qcompiler.lowering.read import CompressedReader
from qcompiler.pipeline.registry import packaged_pipelines
from tests.compile.tiny import model_config, quantization, stored

TWO_ALGORITHMS = {"awq-w4a16+gptq-w8a8", "gptq-w8a8+awq-w4a16"}
MEASURES_ACTIVATIONS = {"fp8", "nvfp4", "nvfp4-fp8", "int4-int8", "w8a8", *TWO_ALGORITHMS}
"""The pipelines that need calibration data; no other is given any."""

MIXES = {
    "int4-int8": (*[{"w:int4/g128/asym"}] * 3, {"w:int8/g128"}),
    "int4-int8-rtn": (*[{"w:int4/g128/asym"}] * 3, {"w:int8/g128"}),
    "awq-w4a16+gptq-w8a8": (*[{"w:int4/g128/asym"}] * 2, *[{"w:int8/channel a:int8/token"}] * 2),
    "gptq-w8a8+awq-w4a16": (*[{"w:int8/channel a:int8/token"}] * 2, *[{"w:int4/g128/asym"}] * 2),
    "nvfp4-fp8": (*[{"w:nvfp4 a:nvfp4"}] * 3, {"w:fp8/channel a:fp8/token"}),
    "fp8-channel-tensor": (*[{"w:fp8/channel a:fp8/token"}] * 2, *[{"w:fp8/tensor a:fp8/token"}] * 2),
    "w8a8+w4a16": (*[{"w:int8/channel a:int8/token"}] * 2, *[{"w:int4/g128"}] * 2),
}
"""The schemes of attention inputs and outputs, MLP inputs and outputs."""

FORMATS = {
    "int4-int8": ("pack-quantized", {"pack-quantized"}),
    "nvfp4-fp8": ("mixed-precision", {"nvfp4-pack-quantized", "float-quantized"}),
    "fp8-channel-tensor": ("float-quantized", {"float-quantized"}),
    "w8a8+w4a16": ("mixed-precision", {"int-quantized", "pack-quantized"}),
    "w4a16": ("pack-quantized", {"pack-quantized"}),
    "mxfp4": ("mxfp4-pack-quantized", {"mxfp4-pack-quantized"}),
}


@dataclass(frozen=True)
class Packaged:
    """A packaged pipeline, run on the bundled model once for all tests that look at it."""

    name: str
    output: Path
    result: Result


@pytest.fixture(scope="session", params=packaged_pipelines())
def packaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    name: str = request.param
    output = tmp_path_factory.mktemp("packaged") / "output"
    data = calibration_text() if name in MEASURES_ACTIVATIONS else None
    sampling = CalibrationSpec(samples=8, sequence_length=128)
    result = qcompiler.compile(model_path(), pipeline=name, output=output, calibration=data, sampling=sampling)
    return Packaged(name, output, result)


def test_the_promised_pipelines_are_there() -> None:
    singles = {"w4a16", "w8a16", "w8a8", "w8a8-rtn", "fp8", "fp8-dynamic", "fp8-block", "nvfp4", "mxfp4", "mxfp8"}
    assert MIXES.keys() | singles <= packaged_pipelines().keys()


def test_transformers_computes_what_was_compiled(packaged: Packaged) -> None:
    verified = qcompiler.verify(packaged.output)
    assert verified.difference == 0
    assert "equal to the last bit" in str(verified)


def test_every_linear_but_the_head_is_quantized_and_smaller(packaged: Packaged) -> None:
    dense = stored(model_path())
    written = stored(packaged.output)
    report = packaged.result.report
    assert [row.path for row in report.layers if row.scheme is None] == ["lm_head"]
    assert len(report.layers) == 29
    assert sum(tensor.nbytes for tensor in written.values()) == report.total_bytes
    assert report.dense_total_bytes == sum(tensor.nbytes for tensor in dense.values())
    for row in report.layers:
        own = sum(tensor.nbytes for key, tensor in written.items() if key.rpartition(".")[0] == row.path)
        assert row.bytes == own
        assert row.bits_per_weight == pytest.approx(8 * own / (row.shape[0] * row.shape[1]))
        assert own < row.dense_bytes or row.scheme is None
    for key in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(written[key], dense[key])


def test_mixes_give_each_structure_its_scheme(packaged: Packaged) -> None:
    if packaged.name not in MIXES:
        return
    for structure, wanted in zip(
        ("attention-input", "attention-output", "mlp-input", "mlp-output"), MIXES[packaged.name], strict=True
    ):
        assert {row.scheme for row in packaged.result.report.layers if row.structure == structure} == wanted


def test_the_library_accepts_the_config_and_finds_one_group_for_each_layer(packaged: Packaged) -> None:
    raw = quantization(packaged.output)
    config = QuantizationConfig.model_validate(raw)
    assert config.quantization_status == "compressed"
    linear = nn.Linear(1, 1, device="meta")
    for row in packaged.result.report.layers:
        groups = [n for n, g in config.config_groups.items() if is_match(row.path, linear, g.targets)]
        ignored = is_match(row.path, linear, config.ignore)
        assert (len(groups), ignored) == ((0, True) if row.scheme is None else (1, False))


def test_formats_are_mixed_only_where_they_differ(packaged: Packaged) -> None:
    raw = quantization(packaged.output)
    formats = {group["format"] for group in raw["config_groups"].values()}
    assert raw["format"] == (formats.pop() if len(formats) == 1 else "mixed-precision")
    if packaged.name in FORMATS:
        assert (raw["format"], {g["format"] for g in raw["config_groups"].values()}) == FORMATS[packaged.name]


def reader(folder: Path, dtype: torch.dtype) -> CompressedReader:
    """The compiled checkpoint read back as a dense one."""
    return CompressedReader(CheckpointReader.open(folder), quantization(folder), dtype)


def test_the_library_decompresses_a_layer_to_the_compilers_weights(packaged: Packaged) -> None:
    written = stored(packaged.output)
    config = QuantizationConfig.model_validate(quantization(packaged.output))
    linear = nn.Linear(1, 1, device="meta")
    with closing(reader(packaged.output, torch.bfloat16)) as ours:
        for row in packaged.result.report.layers:
            if row.layer == 1:
                scheme = next(g for g in config.config_groups.values() if is_match(row.path, linear, g.targets))
                parts = {k.rpartition(".")[2]: t for k, t in written.items() if k.rpartition(".")[0] == row.path}
                theirs = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
                assert torch.equal(theirs, ours.read(f"{row.path}.weight"))


def test_reported_errors_are_those_of_the_weights_on_disk(packaged: Packaged) -> None:
    dense = stored(model_path())
    with closing(reader(packaged.output, torch.float32)) as ours:
        for row in packaged.result.report.layers:
            if row.scheme is None:
                assert row.error is None
                continue
            if row.transform is not None:
                continue  # an error of the weight that a scale was folded into: tests/transforms/test_compiled.py
            weight = dense[f"{row.path}.weight"].double()
            wrong = ours.read(f"{row.path}.weight").double() - weight
            rel = 2e-3 if "nvfp4" in row.scheme else 2e-4  # NVFP4's products are rounded to bfloat16
            assert row.error == pytest.approx(float(wrong.square().sum() / weight.square().sum()), rel=rel)
            assert 0 < row.error < 0.03


def test_the_small_files_of_the_model_come_along(packaged: Packaged) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (packaged.output / name).read_bytes() == (model_path() / name).read_bytes()
    config = model_config(packaged.output)
    del config["quantization_config"]
    assert config == model_config(model_path())
