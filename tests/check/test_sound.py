"""Sound checkpoints, ours and the library's own: no error, whatever wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

import qcompiler
from qcompiler.check import CheckReport, Severity, check_checkpoint
from qcompiler.demo import calibration_text, model_path
from tests.check.checkpoints import DOWN, GATE, UP, Edited
from tests.check.conftest import PIPELINES, Base, Check
from tests.compile.tiny import model_config, stored


def errors(report: CheckReport) -> list[object]:
    return report.of(Severity.ERROR)


@pytest.mark.parametrize("name", [*PIPELINES, "mixture"])
def test_what_traps_are_made_of_is_sound(name: str, base: Base, checked: Check) -> None:
    report = checked(base(name))
    assert not errors(report)
    assert report.quantized > 0
    assert report.scales > 0


@pytest.mark.parametrize(
    ("pipeline", "target"),
    [
        ("int4-int8-rtn", "vllm-sm90"),
        ("w8a8+w4a16", "vllm-cpu"),
        ("fp8-block", "vllm-sm90"),
        ("nvfp4-fp8", "vllm-sm100"),
    ],
)
def test_packaged_pipelines_are_sound_everywhere_and_legal_for_their_target(
    pipeline: str, target: str, tmp_path: Path
) -> None:
    sampling = qcompiler.CalibrationSpec(samples=2, sequence_length=64)
    data = calibration_text() if pipeline == "nvfp4-fp8" else None
    out = qcompiler.compile(
        model_path(), pipeline=pipeline, output=tmp_path / "out", target=target, calibration=data, sampling=sampling
    ).output
    report = check_checkpoint(out)
    assert report.findings == ()
    assert (report.linears, report.quantized) == (29, 28)
    assert report.scales == sum(tensor.numel() for key, tensor in stored(out).items() if key.endswith("_scale"))
    assert check_checkpoint(out, target=target).findings == ()


PRESETS = {"W4A16": "pack-quantized", "W8A8": "int-quantized", "FP8_DYNAMIC": "float-quantized", "MXFP4A16": None}


@pytest.mark.parametrize("preset", PRESETS)
def test_what_the_library_compresses_and_configures_is_sound(preset: str, tmp_path: Path) -> None:
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.format = PRESETS[preset] or "mxfp4-pack-quantized"
    tensors: dict[str, Tensor] = {}
    for key, weight in stored(model_path()).items():
        linear = key.removesuffix(".weight")
        tensors |= library_compressed(linear, weight, scheme) if linear.endswith("_proj") else {key: weight}
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=scheme.format,
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    edited = Edited({**model_config(model_path()), "quantization_config": config.model_dump(mode="json")}, tensors)
    report = check_checkpoint(edited.write(tmp_path / preset))
    assert not errors(report)
    assert report.quantized == 28


def library_compressed(name: str, weight: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """A weight as compressed-tensors' compressor of the format writes it, with scales of its range."""
    assert scheme.weights is not None
    size = scheme.weights.group_size
    rows = weight.unflatten(1, (-1, size)) if size else weight.unsqueeze(1)
    scale, _ = calculate_qparams(rows.amin(-1), rows.amax(-1), scheme.weights)
    state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16)}
    compressed = BaseCompressor.get_value_from_registry(str(scheme.format)).compress(state, scheme)
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in compressed.items()}


def test_the_weights_are_not_read(base: Base, checked: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompiler.checkpoints.reader import CheckpointReader

    mixed = base("mixed")  # compiled, if no test has had it yet, before anything is taken from readers
    read: dict[str, int] = {}
    original = CheckpointReader.bytes_at

    def bytes_at(self: CheckpointReader, key: str, start: int, count: int) -> bytes:
        read[key] = max(read.get(key, 0), count)
        return original(self, key, start, count)

    monkeypatch.setattr(CheckpointReader, "bytes_at", bytes_at)
    monkeypatch.setattr(CheckpointReader, "read", None)
    monkeypatch.setattr(CheckpointReader, "copy_bytes", None)
    checked(mixed)
    assert read
    assert {key.rpartition(".")[2] for key in read} == {"weight_scale", "input_scale", "weight_shape"}
    assert max(read.values()) <= 4 << 20


def test_only_untidy_configs_are_infos(base: Base, checked: Check) -> None:
    edited = base("packed")
    edited.quantization["ignore"] += ["model.layers.7.mlp.down_proj", r"re:.*\.router$"]
    edited.quantization["comment"] = "mine"
    report = checked(edited)
    assert not errors(report)
    assert {f.code for f in report.of(Severity.INFO)} == {"ignore-unmatched", "key-unknown"}


def test_targets_that_overlap_and_agree_are_an_info(base: Base, checked: Check) -> None:
    edited = base("packed")
    edited.split(r"re:.*\.(down)_proj$")
    report = checked(edited)
    assert not errors(report)
    (info,) = report.of(Severity.INFO)
    assert (info.code, info.layer) == ("overlap-alike", "model.layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    ("target", "hint"), [("re:mlp.down_proj$", "begin with `.*`"), ("model.layers.9.mlp.down_proj", "remove it")]
)
def test_a_target_that_matches_nothing_is_a_warning(target: str, hint: str, base: Base, checked: Check) -> None:
    edited = base("packed")
    edited.group()["targets"].append(target)
    report = checked(edited)
    assert not errors(report)
    (warning,) = (f for f in report.findings if f.code == "target-unmatched")
    assert target in warning.message
    assert hint in warning.mend


@pytest.mark.parametrize(("change", "code"), [(torch.zeros_like, "scale-zero"), (torch.neg, "weight-scale-negative")])
def test_scales_that_no_writer_means_are_a_warning(
    change: Callable[[Tensor], Tensor], code: str, base: Base, checked: Check
) -> None:
    edited = base("packed")
    edited.change("model.layers.0.mlp.down_proj.weight_scale", change)
    report = checked(edited)
    assert not errors(report)
    assert code in {f.code for f in report.of(Severity.WARNING)}


def test_nvfp4_without_the_dtype_of_its_scales_is_a_warning(base: Base, checked: Check) -> None:
    edited = base("nvfp4")
    del edited.group()["weights"]["scale_dtype"], edited.group()["input_activations"]["scale_dtype"]
    report = checked(edited)
    assert not errors(report)
    assert "scale-dtype-absent" in {f.code for f in report.of(Severity.WARNING)}


def dense_says_that_it_is_not_sparse(edited: Edited) -> None:
    """As llm-compressor wrote it for years."""
    edited.quantization["sparsity_config"] = {"format": "dense", "global_sparsity": 0.1, "ignore": [], "targets": []}


def one_target_in_two_groups(edited: Edited) -> None:
    edited.split(*edited.group()["targets"])


def an_index_that_lacks_a_tensor(edited: Edited) -> None:
    edited.index = dict.fromkeys([key for key in edited.tensors if key != "model.norm.weight"], "model.safetensors")


def a_tied_head_of_its_own_values(edited: Edited) -> None:
    edited.config["tie_word_embeddings"] = True


def floats_called_integers_by_their_format(edited: Edited) -> None:
    edited.quantization["format"] = edited.group()["format"] = "int-quantized"


def integers_called_floats_by_their_format(edited: Edited) -> None:
    edited.group("group_1")["format"] = "float-quantized"


def a_common_format_that_no_loader_looks_at(edited: Edited) -> None:
    edited.quantization["format"] = "nvfp4-pack-quantized"
    del edited.group()["format"]


def scales_of_nvfp4_that_are_wide(edited: Edited) -> None:
    edited.change(f"{DOWN}.weight_scale", Tensor.float)


def activation_zero_points_that_are_wide(edited: Edited) -> None:
    edited.group("group_1")["input_activations"]["symmetric"] = False
    for name in (GATE, UP, DOWN):
        edited.tensors[f"{name}.input_zero_point"] = torch.tensor([3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "edit", "told"),
    [
        ("packed", dense_says_that_it_is_not_sparse, []),
        ("packed", one_target_in_two_groups, [("target-repeated", Severity.INFO), ("overlap-alike", Severity.INFO)]),
        ("packed", an_index_that_lacks_a_tensor, [("index-incomplete", Severity.INFO)]),
        ("packed", a_tied_head_of_its_own_values, [("tied-differ", Severity.WARNING)]),
        ("channel", floats_called_integers_by_their_format, [("format-untidy", Severity.INFO)]),
        ("channel", a_common_format_that_no_loader_looks_at, [("format-untidy", Severity.INFO)]),
        ("mixed", integers_called_floats_by_their_format, [("format-untidy", Severity.INFO)]),
        ("mixed", activation_zero_points_that_are_wide, []),
        ("nvfp4", scales_of_nvfp4_that_are_wide, []),
    ],
)
def test_what_all_loaders_read_alike_is_no_error(
    name: str, edit: Callable[[Edited], object], told: list[tuple[str, Severity]], base: Base, checked: Check
) -> None:
    edited = base(name)
    edit(edited)
    assert {(f.code, f.severity) for f in checked(edited).findings} - {("no-kernel", Severity.WARNING)} == set(told)


def test_a_tied_head_of_the_same_values_is_sound(base: Base, checked: Check) -> None:
    edited = base("packed")
    edited.config["tie_word_embeddings"] = True
    edited.tensors["lm_head.weight"] = edited.tensors["model.embed_tokens.weight"].clone()
    assert "tied-differ" not in {finding.code for finding in checked(edited).findings}


def test_a_global_scale_that_looks_like_a_reciprocal_is_a_warning(base: Base, checked: Check) -> None:
    edited = base("nvfp4")
    edited.change("model.layers.0.mlp.down_proj.weight_global_scale", torch.reciprocal)
    report = checked(edited)
    assert not errors(report)
    assert "global-scale-small" in {f.code for f in report.of(Severity.WARNING)}


def test_global_scales_of_no_dimension_are_a_warning(base: Base, checked: Check) -> None:
    edited = base("nvfp4")
    edited.change(f"{DOWN}.input_global_scale", lambda scale: scale.reshape(()))
    report = checked(edited)
    assert not errors(report)
    (warning,) = (f for f in report.of(Severity.WARNING) if f.code == "global-scale-scalar")
    assert (warning.layer, warning.loaders) == (DOWN, ("transformers",))
    assert "input_global_scale of shape []" in warning.message


@pytest.mark.parametrize(
    ("key", "written", "mend"), [("group_size", 32, 'write "group_size": 16'), ("num_bits", 8, 'write "num_bits": 4')]
)
def test_a_scheme_that_the_shapes_deny_is_told_with_the_one_they_fit(
    key: str, written: int, mend: str, base: Base, checked: Check
) -> None:
    edited = base("packed")
    edited.group()["weights"][key] = written
    assert any(mend in finding.mend for finding in checked(edited).of(Severity.ERROR))


def test_a_tied_head_has_no_tensors_of_its_own(base: Base, checked: Check) -> None:
    edited = base("packed")
    edited.config["tie_word_embeddings"] = True
    del edited.tensors["lm_head.weight"]
    assert not errors(checked(edited))


def test_a_model_that_is_not_captured_is_judged_by_its_tensor_names(base: Base, checked: Check) -> None:
    edited = base("packed")
    edited.config |= {"model_type": "not-in-transformers", "architectures": ["Unheard"]}
    report = checked(edited)
    assert not errors(report)
    assert (report.linears, report.quantized) == (8, 7)
    (warning,) = (f for f in report.of(Severity.WARNING) if f.code == "not-captured")
    assert warning.mend == "correct config.json, or install a newer Transformers that knows it"
    del edited.tensors["model.layers.0.mlp.down_proj.weight_scale"]
    assert {f.code for f in errors(checked(edited))} == {"tensor-missing"}  # type: ignore[attr-defined]


def test_a_foreign_tensor_is_a_warning(base: Base, checked: Check) -> None:
    edited = base("packed")
    edited.tensors["model.layers.0.adapter.weight"] = torch.ones(2, 2)
    report = checked(edited)
    assert not errors(report)
    (warning,) = (f for f in report.findings if f.code == "tensor-unknown")
    assert warning.layer == "model.layers.0.adapter.weight"


def test_sharded_checkpoints_are_read(base: Base, checked: Check, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    edited = base("packed")
    folder = edited.write(tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    half = len(edited.tensors) // 2
    shards = {"a.safetensors": list(edited.tensors)[:half], "b.safetensors": list(edited.tensors)[half:]}
    for name, keys in shards.items():
        save_file({key: edited.tensors[key] for key in keys}, folder / name)
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert not errors(check_checkpoint(folder))
