"""The emitted config: what it says, that every loader reads it alike, and that nothing unprovable is written."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.quantization_config import CompressedTensorsConfig

from qcompiler.emit.config import EmittedConfig, build_quantization_config, prove
from qcompiler.emit.schema import parse_quantization_config
from qcompiler.emit.sites import Site
from qcompiler.errors import ConfigError, VerificationError
from qcompiler.scheme import PRESETS, KVCacheSpec, Scheme, preset
from qcompiler.targets import fused_tables, load_target, target_names
from tests.emit.models import ATTENTION, MLP, llama, mixture

W4, W8, FP8 = preset("W4A16"), preset("W8A8"), preset("FP8_DYNAMIC")
ASYMMETRIC = preset("W4A16_ASYM")


def emit(sites: list[Site], **options: Any) -> EmittedConfig:
    return build_quantization_config(sites, **options)


def all_but_head(scheme: Scheme) -> Any:
    return lambda name: None if name == "lm_head" else scheme


def targets_of(emitted: EmittedConfig) -> dict[str, list[str]]:
    return {name: group["targets"] for name, group in emitted.config["config_groups"].items()}


def matched_by(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def test_one_scheme_takes_one_expression_per_leaf() -> None:
    emitted = emit(llama(all_but_head(W4)))
    assert targets_of(emitted) == {"group_0": [rf"re:.*\.{leaf}$" for leaf in (*ATTENTION, *MLP)]}
    assert emitted.config["ignore"] == ["lm_head"]
    assert emitted.config["format"] == "pack-quantized"
    assert emitted.exact_names_because is None
    assert emitted.summary == (
        "28 of 29 sites quantized by 1 groups with 7 targets, read alike by vllm, transformers, sglang"
    )


def test_layers_that_differ_are_told_apart_by_number() -> None:
    def rule(name: str) -> Scheme | None:
        if name == "lm_head" or ".2." in name:
            return None
        return W8 if ".0.mlp" in name or "attn" in name else W4

    emitted = emit(llama(rule))
    assert r"re:.*\.layers\.(?:1|3)\.mlp\.down_proj$" in targets_of(emitted)["group_1"]
    assert r"re:.*\.layers\.0\.mlp\.down_proj$" in targets_of(emitted)["group_0"]
    assert "model.layers.2.mlp.down_proj" in emitted.config["ignore"]
    assert emitted.config["format"] == "mixed-precision"
    assert [g["format"] for g in emitted.config["config_groups"].values()] == ["int-quantized", "pack-quantized"]


def test_two_packed_schemes_keep_the_packed_format() -> None:
    emitted = emit(llama(lambda n: None if n == "lm_head" else W4 if "mlp" in n else preset("W8A16")))
    assert emitted.config["format"] == "pack-quantized"


def test_a_quantized_head_is_named() -> None:
    emitted = emit(llama(lambda name: W4))
    assert "lm_head" in targets_of(emitted)["group_0"]
    assert emitted.config["ignore"] == []


def test_experts_are_named_by_the_word_that_transformers_looks_for() -> None:
    emitted = emit(mixture(lambda n: W4 if ".experts." in n else None))
    assert targets_of(emitted) == {"group_0": [rf"re:.*\.experts\.\d+\.{leaf}$" for leaf in MLP]}


def test_experts_and_shared_experts_of_two_schemes_stay_apart() -> None:
    emitted = emit(mixture(lambda n: W4 if ".experts." in n else FP8 if "shared" in n or "attn" in n else None))
    groups = targets_of(emitted)
    assert r"re:.*\.shared_experts\.down_proj$" in groups["group_1"]
    assert groups["group_0"] == [rf"re:.*\.experts\.\d+\.{leaf}$" for leaf in MLP]


def test_a_router_in_ignore_does_not_swallow_the_gates_that_begin_like_it() -> None:
    emitted = emit(mixture(lambda n: W4 if "mlp" in n and not n.endswith("mlp.gate") else None, layers=2))
    assert "model.layers.1.mlp.gate" in emitted.config["ignore"]
    sites = [Site("model.layers.0.mlp.gate", 4, 256), Site("model.layers.0.mlp.gate_proj", 256, 256, W4)]
    assert emit(sites).config["ignore"] == [r"re:model\.layers\.0\.mlp\.gate$"]


def test_dense_experts_are_ignored_by_expression() -> None:
    sites = mixture(lambda n: W4 if "attn" in n else None)
    emitted = emit(sites, loaders=("vllm", "sglang"))
    assert r"re:.*\.experts\.\d+\.gate_proj$" in emitted.config["ignore"]
    assert not any("experts.0." in entry for entry in emitted.config["ignore"])


def test_dense_experts_beside_packed_linears_are_refused_for_transformers() -> None:
    emit(mixture(lambda n: FP8 if "attn" in n else None))
    with pytest.raises(VerificationError, match=r"transformers reads model\.layers\.1\.mlp\.experts\.0\.gate_proj"):
        emit(mixture(lambda n: W4 if "attn" in n else None))


def test_experts_of_layers_that_differ_are_refused_for_transformers_alone() -> None:
    def rule(name: str) -> Scheme | None:
        return None if ".experts." not in name else W4 if ".1." in name.partition(".mlp")[0] + "." else preset("W8A16")

    with pytest.raises(VerificationError, match="transformers reads"):
        emit(mixture(rule))
    assert len(targets_of(emit(mixture(rule), loaders=("vllm", "sglang")))) == 2


def test_shards_of_two_schemes_are_never_written() -> None:
    with pytest.raises(VerificationError) as error:
        emit(llama(lambda n: None if "mlp" not in n else ASYMMETRIC if "up_proj" in n else W4))
    assert "vllm reads model.layers.0.mlp.up_proj (in its module model.layers.0.mlp.gate_up_proj)" in str(error.value)
    assert "give all of model.layers.0.mlp.gate_up_proj one scheme" in str(error.value)


def test_a_partly_dense_fused_module_is_never_written() -> None:
    with pytest.raises(VerificationError, match="Found different quantization schemes for the shards of"):
        emit(llama(lambda n: W4 if n.endswith(("q_proj", "k_proj")) else None))


def test_names_that_no_expression_tells_apart_are_written_out() -> None:
    experts = [Site(f"n.experts.{i}.{leaf}", 64, 64, W4, kind="experts") for i in range(2) for leaf in MLP]
    look_alike = Site("m.experts.5.up_proj", 64, 64, W8)
    emitted = emit([*experts, look_alike])
    assert emitted.exact_names_because is not None
    assert "m.experts.5.up_proj" in emitted.exact_names_because
    assert targets_of(emitted) == {"group_0": [site.name for site in experts], "group_1": [look_alike.name]}
    assert "; exact names because vllm reads m.experts.5.up_proj as group group_0" in emitted.summary


def test_names_without_structure_are_written_as_they_are() -> None:
    names = ["alpha", "model.3.beta", "x-y.0.gamma"]
    emitted = emit([Site(name, 64, 64, W4 if i else W8) for i, name in enumerate(names)])
    assert targets_of(emitted)["group_0"] == ["alpha"]
    assert prove(emitted.config, [Site("alpha", 64, 64, W4)], ["vllm"]) != []


def test_the_proof_finds_a_target_that_takes_a_fused_name() -> None:
    sites = llama(lambda n: W4 if "mlp" in n else None, layers=1)
    config = emit(sites).config
    config["config_groups"]["group_0"]["targets"] = [r"re:.*down_proj$"]
    config["config_groups"]["group_1"] = {**emit(llama(all_but_head(W8))).config["config_groups"]["group_0"]}
    config["config_groups"]["group_1"]["targets"] = [r"re:.*up_proj$"]
    names = {d.name for d in prove(config, sites, ["vllm"])}
    assert names == {"model.layers.0.mlp.gate_up_proj"}


def test_the_proof_tries_every_table_of_fused_names_that_a_loader_may_meet() -> None:
    """A runtime on other hardware that also fuses o_proj with q_proj would find two schemes in one module."""
    sites = llama(lambda n: {"q_proj": W4, "o_proj": W8}.get(n.rpartition(".")[2]), layers=1)
    sites = [site for site in sites if site.leaf in ("q_proj", "o_proj")]
    config = emit(sites).config
    assert prove(config, sites, ["vllm"]) == []
    qo_proj = {"qo_proj": [["q_proj", "o_proj"]]}
    (found,) = prove(config, sites, ["vllm"], fused=lambda loader: [{}, qo_proj])
    assert found.name == "model.layers.0.self_attn.qo_proj"


@pytest.mark.parametrize("target", target_names())
def test_the_proof_knows_the_fused_names_of_every_target(target: str) -> None:
    assert load_target(target).fused in fused_tables(load_target(target).loader)


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(ConfigError, match="nothing is quantized"):
        emit(llama(lambda name: None))


def test_unknown_loaders_and_repeated_names_are_errors() -> None:
    with pytest.raises(ConfigError, match="unknown loader 'tensorrt'"):
        emit(llama(lambda name: W4), loaders=("tensorrt",))
    with pytest.raises(ConfigError, match="two sites have the name 'a'"):
        emit([Site("a", 1, 1, W4), Site("a", 1, 1, W4)])


def test_a_quantized_cache_alone_has_no_groups() -> None:
    config = emit(llama(lambda name: None), kv_cache=KVCacheSpec()).config
    assert config["config_groups"] == {}
    assert config["kv_cache_scheme"]["strategy"] == "tensor"
    assert QuantizationConfig.model_validate(config).kv_cache_scheme.num_bits == 8


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_library_accepts_every_preset_and_the_parser_gives_it_back(name: str) -> None:
    sites = llama(all_but_head(PRESETS[name]), layers=1)
    config = json.loads(json.dumps(emit(sites, kv_cache=KVCacheSpec(strategy="attn_head")).config))
    library = CompressedTensorsConfig(**config).quantization_config
    (group,) = library.config_groups.values()
    assert (group.weights.num_bits, str(group.weights.strategy)) == (
        PRESETS[name].weights.bits,
        str(PRESETS[name].weights.strategy),
    )
    parsed = parse_quantization_config(config)
    assert [g.scheme for g in parsed.groups] == [PRESETS[name]]
    assert parsed.ignore == ("lm_head",)
    assert parsed.kv_cache == KVCacheSpec(strategy="attn_head")


SCHEMES = [None, W4, W8, FP8]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_legal_mix_is_emitted_disjoint_and_as_the_library_reads_it(data: st.DataObject) -> None:
    units = {unit: data.draw(st.sampled_from(SCHEMES)) for unit in itertools.product(range(3), ("qkv", "o", "gu", "d"))}
    unit_of = dict(zip((*ATTENTION, *MLP), ("qkv", "qkv", "qkv", "o", "gu", "gu", "d"), strict=True))
    head = data.draw(st.sampled_from(SCHEMES))

    def rule(name: str) -> Scheme | None:
        return head if name == "lm_head" else units[int(name.split(".")[2]), unit_of[name.rpartition(".")[2]]]

    sites = llama(rule, layers=3)
    if all(site.scheme is None for site in sites):
        return
    emitted = emit(sites)
    every_target = list(itertools.chain.from_iterable(targets_of(emitted).values()))
    for site in sites:
        matching = [target for target in every_target if matched_by(target, site.name)]
        assert len(matching) == (site.scheme is not None), (site.name, matching)
        assert any(matched_by(entry, site.name) for entry in emitted.config["ignore"]) == (site.scheme is None)

    model = torch.nn.Module()
    for site in sites:
        parent = model
        for part in site.name.split(".")[:-1]:
            if part not in dict(parent.named_children()):
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(site.leaf, torch.nn.Linear(256, 256, device="meta"))
    apply_quantization_config(model, QuantizationConfig.model_validate(emitted.config), show_progress=False)
    for site in sites:
        scheme = getattr(model.get_submodule(site.name), "quantization_scheme", None)
        assert (scheme and scheme.weights.num_bits) == (site.scheme and site.scheme.weights.bits)
        assert (scheme and str(scheme.weights.type)) == (site.scheme and site.scheme.weights.type)
