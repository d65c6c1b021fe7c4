from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qcompiler.checkpoints.memory import LoadedTensors
from qcompiler.checkpoints.names import NameMap
from qcompiler.checkpoints.reader import CheckpointReader, RawTensor
from qcompiler.checkpoints.writer import write_safetensors
from qcompiler.errors import CheckpointError

Tiny = Callable[..., PreTrainedModel]
OnMeta = Callable[[Path], PreTrainedModel]
Loaded = Callable[[Path], tuple[PreTrainedModel, dict[str, Any]]]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_state(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        assert ours[path].dtype == value.dtype, path
        assert torch.equal(ours[path], value), path


def assert_round_trip(folder: Path, tmp_path: Path, on_meta: OnMeta, loaded: Loaded) -> NameMap:
    """Lazily loaded values are Transformers'; what is written has its names, and loads to the same state."""
    reference, _ = loaded(folder)
    state = reference.state_dict()
    saved, written = tmp_path / "saved", tmp_path / "written"
    reference.save_pretrained(saved)
    written.mkdir()
    with CheckpointReader.open(folder) as reader:
        names = NameMap.build(on_meta(folder), reader)
        assert_same_state(names.load_many(state), state)
        assert_same_state({path: names.load(path) for path in state}, state)
        assert {p: (v.dtype, tuple(v.shape)) for p, v in state.items()} == {p: names.spec(p) for p in state}
        # As copies where possible, and from the loaded model, whose merged experts are not what the files hold.
        from_memory = NameMap.of_loaded(on_meta(folder), LoadedTensors(reference), reference._weight_conversions)
        expected = load_file(saved / "model.safetensors")
        for each in (names, from_memory):
            tensors = each.dense(state)
            assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == each.dense_specs(state)
            write_safetensors(written / "model.safetensors", tensors)
            assert_same_state(load_file(written / "model.safetensors"), expected)
    (written / "config.json").write_text((saved / "config.json").read_text())
    again, info = loaded(written)
    assert not any(info.values()), info
    assert_same_state(again.state_dict(), state)
    return names


def test_every_family_loads_and_writes_as_transformers_does(
    family: str, tmp_path: Path, tiny: Tiny, on_meta: OnMeta, loaded: Loaded
) -> None:
    tiny(family).save_pretrained(tmp_path / "model")
    names = assert_round_trip(tmp_path / "model", tmp_path, on_meta, loaded)
    assert not names.unexpected


def test_every_family_round_trips_from_the_names_that_transformers_uses_inside(
    family: str, tmp_path: Path, tiny: Tiny, on_meta: OnMeta, loaded: Loaded
) -> None:
    tiny(family, dtype=torch.bfloat16).save_pretrained(tmp_path / "model", save_original_format=False)
    assert_round_trip(tmp_path / "model", tmp_path, on_meta, loaded)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "opt"])
def test_a_checkpoint_of_the_base_model_gets_the_prefix(
    family: str, tmp_path: Path, tiny: Tiny, on_meta: OnMeta, loaded: Loaded
) -> None:
    model = tiny(family, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path / "model")
    assert_round_trip(tmp_path / "model", tmp_path, on_meta, loaded)


def test_tied_parameters_absent_from_the_files_take_their_source(
    tmp_path: Path, tiny: Tiny, on_meta: OnMeta, loaded: Loaded
) -> None:
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    names = assert_round_trip(tmp_path / "model", tmp_path, on_meta, loaded)
    assert dict(names.aliases) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert names.disk_name("lm_head.weight") is None
    assert "tied to model.embed_tokens.weight" in (names.obstacle("lm_head.weight") or "")
    with pytest.raises(CheckpointError, match=r"a new value of lm_head.weight cannot be written: .* is tied to"):
        names.dense([], {"lm_head.weight": torch.zeros(1)})


def test_a_tie_whose_source_is_absent_is_turned_round(
    tmp_path: Path, tiny: Tiny, on_meta: OnMeta, loaded: Loaded
) -> None:
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    rewrite(
        tmp_path / "model",
        lambda t: {k.replace("model.embed_tokens", "lm_head"): v for k, v in t.items()},
    )
    assert_round_trip(tmp_path / "model", tmp_path, on_meta, loaded)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_parameters_that_should_be_tied_are_tied_only_if_the_files_agree(
    factor: float, tmp_path: Path, tiny: Tiny, on_meta: OnMeta, loaded: Loaded
) -> None:
    tiny("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    rewrite(tmp_path / "model", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * factor})
    names = assert_round_trip(tmp_path / "model", tmp_path, on_meta, loaded)
    assert ("lm_head.weight" in names.aliases) == (factor == 1.0)


def test_keys_without_a_place_are_left_out_and_listed_unless_transformers_expects_them(
    tmp_path: Path, tiny: Tiny, on_meta: OnMeta, loaded: Loaded
) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    known, alien = "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.2.mtp.weight"
    rewrite(tmp_path / "model", lambda t: t | {known: torch.ones(4), alien: torch.ones(2)})
    names = assert_round_trip(tmp_path / "model", tmp_path, on_meta, loaded)
    assert names.unexpected == (alien,)


def test_tensors_that_stay_as_they_are_on_disk_are_copied(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    tiny("mixtral").save_pretrained(tmp_path)
    model = on_meta(tmp_path)
    with CheckpointReader.open(tmp_path) as reader:
        names = NameMap.build(model, reader)
        assert all(isinstance(t, RawTensor) for t in names.dense(model.state_dict()).values())


def test_experts_merged_in_memory_are_written_apart(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    model = tiny("mixtral")
    model.save_pretrained(tmp_path)
    path = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = NameMap.of_loaded(on_meta(tmp_path), LoadedTensors(model), None).dense([path, "model.norm.weight"])
    third_up = tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    assert isinstance(third_up, torch.Tensor)
    assert torch.equal(third_up, model.state_dict()[path][2, 48:])
    assert isinstance(tensors["model.norm.weight"], RawTensor)


def test_a_dtype_that_the_model_does_not_have_is_converted_not_copied(
    tmp_path: Path, tiny: Tiny, on_meta: OnMeta, loaded: Loaded
) -> None:
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    rewrite(tmp_path / "model", lambda t: {k: v.float() if "norm" in k else v for k, v in t.items()})
    names = assert_round_trip(tmp_path / "model", tmp_path, on_meta, loaded)
    assert names.spec("model.norm.weight")[0] is torch.bfloat16


def test_merged_experts_know_their_parts(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    tiny("mixtral").save_pretrained(tmp_path)
    with CheckpointReader.open(tmp_path) as reader:
        names = NameMap.build(on_meta(tmp_path), reader)
        for path in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
            value, parts = names.load(path), names.parts(path)
            assert parts is not None
            assert len(parts) == (6 if "gate" in path else 3)
            for key, index in parts.items():
                assert torch.equal(value[index], reader.read(key))
            assert "stored as" in (names.obstacle(path) or "")
        assert names.parts("model.norm.weight") is None
        assert names.disk_name("model.layers.1.mlp.gate.weight") == "model.layers.1.block_sparse_moe.gate.weight"


def test_experts_that_came_merged_stay_merged_and_those_of_a_new_model_are_split(
    tmp_path: Path, tiny: Tiny, on_meta: OnMeta
) -> None:
    model = tiny("mixtral")
    model.save_pretrained(tmp_path / "merged", save_original_format=False)
    model.save_pretrained(tmp_path / "original")
    path = "model.layers.0.mlp.experts.down_proj"
    meta = on_meta(tmp_path / "merged")
    with CheckpointReader.open(tmp_path / "merged") as reader:
        assert NameMap.build(meta, reader).disk_name(path) == path
    names = NameMap.of_loaded(meta, LoadedTensors(model), None)
    assert names.dense(meta.state_dict()).keys() == load_file(tmp_path / "original/model.safetensors").keys()
    assert len(names.parts(path) or {}) == 3


def test_a_linear_cut_from_a_fused_tensor_has_no_name_of_its_own(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    tiny("hrm_text").save_pretrained(tmp_path)
    with CheckpointReader.open(tmp_path) as reader:
        model = on_meta(tmp_path)
        names = NameMap.build(model, reader)
        path = next(p for p in model.state_dict() if p.endswith("q_proj.weight"))
        layer = path.removesuffix("q_proj.weight")
        assert names.disk_name(path) is None
        obstacle = names.obstacle(path) or ""
        assert f"{layer}k_proj.weight" in obstacle
        assert "gqkv_proj.weight' (Concatenate)" in obstacle
        with pytest.raises(CheckpointError, match=r"gqkv_proj.weight on disk is made of .* is not written"):
            names.dense([path])


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_fused_linears_of_the_model_itself_keep_their_names(
    family: str, tmp_path: Path, tiny: Tiny, on_meta: OnMeta
) -> None:
    tiny(family).save_pretrained(tmp_path)
    with CheckpointReader.open(tmp_path) as reader:
        model = on_meta(tmp_path)
        names = NameMap.build(model, reader)
        assert all(names.disk_name(p) == p for p in model.state_dict() if p not in names.aliases)


def test_missing_parameters_are_named_with_near_keys(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    tiny("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {k.replace("1.self_attn.q_proj", "1.self_attn.q_prj"): v for k, v in t.items()})
    with (
        CheckpointReader.open(tmp_path) as reader,
        pytest.raises(
            CheckpointError, match=r"1 of the model's parameters: 'model.layers.1.self_attn.q_proj.weight'.*q_prj"
        ),
    ):
        NameMap.build(on_meta(tmp_path), reader)


def test_a_shape_that_is_not_the_models_is_refused(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with (
        CheckpointReader.open(tmp_path) as reader,
        pytest.raises(CheckpointError, match=r"down_proj.weight' has shape \[32, 40\], the checkpoint's \[32, 48\]"),
    ):
        NameMap.build(on_meta(tmp_path), reader)


def test_a_missing_expert_is_refused(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    tiny("mixtral").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if "0.block_sparse_moe.experts.1.w2" not in k})
    with (
        CheckpointReader.open(tmp_path) as reader,
        pytest.raises(CheckpointError, match=r"experts.down_proj' has shape \[3, 32, 48\].*\[2, 32, 48\]"),
    ):
        NameMap.build(on_meta(tmp_path), reader)


def test_two_keys_of_one_parameter_are_refused(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    tiny("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t | {"norm.weight": torch.zeros(32)})
    with (
        CheckpointReader.open(tmp_path) as reader,
        pytest.raises(CheckpointError, match=r"'model.norm.weight', 'norm.weight' are all names of"),
    ):
        NameMap.build(on_meta(tmp_path), reader)


def test_parameters_kept_in_float32_are_loaded_as_transformers_does(
    tmp_path: Path, tiny: Tiny, on_meta: OnMeta, loaded: Loaded
) -> None:
    tiny("deepseek_v3", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    names = assert_round_trip(tmp_path / "model", tmp_path, on_meta, loaded)
    assert names.spec("model.layers.1.mlp.gate.e_score_correction_bias")[0] is torch.float32


def test_an_unknown_path_is_an_error_with_near_names(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with CheckpointReader.open(tmp_path) as reader:
        names = NameMap.build(on_meta(tmp_path), reader)
        with pytest.raises(CheckpointError, match=r"did you mean 'model.norm.weight'"):
            names.load("model.nrm.weight")


def test_a_sharded_checkpoint_loads_as_one(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    model = tiny("mixtral")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    state = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    with CheckpointReader.open(tmp_path) as reader:
        assert_same_state(NameMap.build(on_meta(tmp_path), reader).load_many(state), state)


def test_what_the_class_declares_absent_is_neither_loaded_nor_written(
    tmp_path: Path, tiny: Tiny, on_meta: OnMeta
) -> None:
    tiny("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"})
    model = on_meta(tmp_path)
    model._keys_to_ignore_on_load_missing = {r"model\.norm"}
    with CheckpointReader.open(tmp_path) as reader:
        names = NameMap.build(model, reader)
        assert names.absent == {"model.norm.weight"}
        assert "model.norm.weight" not in names.dense(model.state_dict())
        with pytest.raises(CheckpointError, match=r"no file holds 'model.norm.weight'"):
            names.load("model.norm.weight")


def test_what_the_class_does_not_save_is_not_written(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    tiny("llama").save_pretrained(tmp_path)
    model = on_meta(tmp_path)
    model._keys_to_ignore_on_save = {"model.norm.weight"}
    with CheckpointReader.open(tmp_path) as reader:
        names = NameMap.build(model, reader)
        assert names.dense(model.state_dict()).keys() == model.state_dict().keys() - {"model.norm.weight"}
        assert "not part of a saved model" in (names.obstacle("model.norm.weight") or "")


def test_building_leaves_the_model_untouched(tmp_path: Path, tiny: Tiny, on_meta: OnMeta) -> None:
    tiny("mixtral").save_pretrained(tmp_path)
    model = on_meta(tmp_path)
    before = {path: id(value) for path, value in model.state_dict(keep_vars=True).items()}
    attributes = set(vars(model))
    with CheckpointReader.open(tmp_path) as reader:
        NameMap.build(model, reader).load_many(before)
    assert {path: id(value) for path, value in model.state_dict(keep_vars=True).items()} == before
    assert set(vars(model)) == attributes
