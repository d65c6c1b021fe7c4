"""Rules that look at more than one linear's numbers: fused modules, experts, structures, the model as a whole."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qcompiler.emit.sites import Site
from qcompiler.errors import ConfigError
from qcompiler.scheme import KVCacheSpec, Scheme, preset
from qcompiler.targets import MODEL, Violation, check, load_target, target_names

W4, ASYMMETRIC, BLOCK = preset("W4A16"), preset("W4A16_ASYM"), preset("FP8_BLOCK")
LAYER = "model.layers.0"


def site(name: str, scheme: Scheme | None, out: int = 256, **fields: Any) -> Site:
    return Site(f"{LAYER}.{name}", out, 512, scheme, **fields)


def only(violations: list[Violation]) -> Violation:
    assert len(violations) == 1, violations
    return violations[0]


@pytest.mark.parametrize("target", ["vllm-sm80", "vllm-sm90", "vllm-sm100", "vllm-cpu", "sglang"])
def test_shards_of_one_runtime_module_must_share_their_scheme(target: str) -> None:
    sites = [site("mlp.gate_proj", W4), site("mlp.up_proj", ASYMMETRIC)]
    violation = only(check(load_target(target), sites))
    assert violation.rule == "fused-same-scheme"
    assert f"fuses {LAYER}.mlp.gate_up_proj into one linear" in violation.message
    assert "gate_proj w:int4/g128, up_proj w:int4/g128/asym" in violation.message
    assert violation.mend == "give gate_proj, up_proj one scheme"


def test_a_dense_shard_beside_a_quantized_one_is_a_difference() -> None:
    sites = [site("self_attn.q_proj", W4), site("self_attn.k_proj", W4), site("self_attn.v_proj", None)]
    assert "v_proj dense" in only(check(load_target("vllm-sm80"), sites)).message


def test_transformers_fuses_nothing() -> None:
    sites = [site("mlp.gate_proj", W4, fusion_group="g"), site("mlp.up_proj", ASYMMETRIC, fusion_group="g")]
    assert check(load_target("transformers"), sites) == []


def test_fusion_groups_count_where_names_say_nothing() -> None:
    rng = random.Random(0)
    names = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(2)]
    sites = [site(names[0], W4, fusion_group="7"), site(names[1], ASYMMETRIC, fusion_group="7")]
    violation = only(check(load_target("vllm-sm80"), sites))
    assert violation.rule == "fused-same-scheme"
    assert f"{LAYER}.[{names[0]}+{names[1]}]" in violation.message


def test_only_the_last_fused_shard_may_end_inside_a_block() -> None:
    gate, up = site("mlp.gate_proj", BLOCK, 200), site("mlp.up_proj", BLOCK, 256)
    violation = only(check(load_target("vllm-sm90"), [gate, up]))
    assert (violation.rule, violation.site) == ("fused-block-rows", gate.name)
    assert "200 outputs are not a multiple of 128" in violation.message
    last = site("mlp.up_proj", BLOCK, 200)
    assert check(load_target("vllm-sm90"), [site("mlp.gate_proj", BLOCK), last]) == []
    assert check(load_target("vllm-sm90"), [site("mlp.down_proj", BLOCK, 200)]) == []


def test_zero_points_of_fused_shards_fill_whole_words() -> None:
    sites = [site("mlp.gate_proj", ASYMMETRIC, 252), site("mlp.up_proj", ASYMMETRIC, 252)]
    violations = check(load_target("vllm-sm80"), sites)
    assert {v.rule for v in violations} == {"packed-zero-points"}
    assert "252 zero points of 4 bits do not fill whole 32-bit words" in violations[0].message
    assert check(load_target("vllm-sm80"), [site("mlp.down_proj", ASYMMETRIC, 252)]) == []


def test_kernel_multiples_count_the_fused_module() -> None:
    shards = [site(f"self_attn.{name}_proj", W4, 16) for name in "qk"]
    assert check(load_target("vllm-cpu"), [*shards, site("self_attn.v_proj", W4, 32)]) == []
    violation = only(check(load_target("vllm-cpu"), [*shards, site("self_attn.v_proj", W4, 16)]))
    assert f"48 outputs of {LAYER}.self_attn.qkv_proj are not a multiple of 32" in violation.message


@pytest.mark.parametrize("target", target_names())
def test_routers_stay_dense(target: str) -> None:
    violation = only(check(load_target(target), [site("mlp.gate", W4, structure="router")]))
    assert (violation.rule, violation.mend) == ("dense-router", "leave it dense")


@pytest.mark.parametrize("target", target_names())
def test_conv1d_has_no_form_on_disk(target: str) -> None:
    violation = only(check(load_target(target), [site("attn.c_attn", W4, kind="conv1d")]))
    assert violation.rule == "conv1d"
    assert check(load_target(target), [site("attn.c_attn", None, kind="conv1d")]) == []


@pytest.mark.parametrize("target", ["vllm-sm80", "vllm-sm90", "vllm-sm100", "sglang"])
def test_the_head_takes_no_block_scales(target: str) -> None:
    head = Site("lm_head", 32000, 512, BLOCK, structure="lm-head")
    assert only(check(load_target(target), [head])).rule == "fp8-block"
    assert check(load_target(target), [Site("lm_head", 32000, 512, preset("FP8_DYNAMIC"), structure="lm-head")]) == []


def test_a_padded_vocabulary_need_not_suit_the_kernel() -> None:
    assert check(load_target("vllm-cpu"), [Site("lm_head", 32003, 512, W4, structure="lm-head")]) == []
    odd = Site("lm_head", 32003, 512, ASYMMETRIC, structure="lm-head")
    assert only(check(load_target("vllm-cpu"), [odd])).rule == "packed-zero-points"


def experts(schemes: dict[str, Scheme | None], layer: int = 0) -> list[Site]:
    return [
        Site(f"model.layers.{layer}.mlp.experts.{e}.{leaf}", 512, 512, scheme, structure="experts", kind="experts")
        for e in range(2)
        for leaf, scheme in schemes.items()
    ]


@pytest.mark.parametrize("target", target_names())
def test_experts_of_a_block_share_one_scheme(target: str) -> None:
    mixed = experts({"gate_proj": W4, "up_proj": W4, "down_proj": None})
    violation = next(v for v in check(load_target(target), mixed) if v.rule == "experts-one-scheme")
    assert "model.layers.0.mlp.experts.0.gate_proj is w:int4/g128" in violation.message
    assert violation.site.endswith("experts.0.down_proj")


def test_only_transformers_wants_the_experts_of_all_layers_alike() -> None:
    wide = preset("W8A16")
    sites = [
        *experts(dict.fromkeys(("gate_proj", "up_proj", "down_proj"), W4), layer=0),
        *experts(dict.fromkeys(("gate_proj", "up_proj", "down_proj"), wide), layer=1),
    ]
    assert check(load_target("vllm-sm90"), sites) == []
    assert only(check(load_target("transformers"), sites)).rule == "experts-one-scheme-per-model"


def test_dense_experts_load_in_transformers_beside_fp8_only() -> None:
    dense = experts(dict.fromkeys(("gate_proj", "up_proj", "down_proj")))
    packed = [*dense, site("self_attn.o_proj", W4)]
    violation = only(check(load_target("transformers"), packed))
    assert violation.rule == "experts-dense"
    assert "they would stay at random" in violation.message
    assert check(load_target("transformers"), [*dense, site("self_attn.o_proj", preset("FP8_DYNAMIC"))]) == []
    assert check(load_target("transformers"), dense) == []
    assert check(load_target("vllm-sm90"), packed) == []


def test_the_kv_cache_and_the_head_size_belong_to_the_model() -> None:
    per_head = KVCacheSpec(strategy="attn_head")
    violation = only(check(load_target("sglang"), [], kv_cache=per_head))
    assert (violation.site, violation.rule, violation.mend) == (MODEL, "kv-cache", "use strategy tensor")
    for target in ("vllm-sm90", "vllm-sm100", "transformers"):
        assert check(load_target(target), [], kv_cache=per_head) == []
    for target in ("vllm-sm80", "vllm-sm89", "vllm-cpu"):  # no FlashAttention 3 there
        assert only(check(load_target(target), [], kv_cache=per_head)).rule == "kv-cache"
    assert "heads of 8" in only(check(load_target("vllm-cpu"), [], head_sizes=[8])).message
    assert check(load_target("vllm-cpu"), [], head_sizes=[64]) == []
    assert check(load_target("vllm-sm90"), [], head_sizes=[8]) == []


def test_an_unknown_target_names_the_near_ones_and_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"unknown target 'vllm-sm9'; did you mean 'vllm-sm90'") as error:
        load_target("vllm-sm9")
    assert all(name in str(error.value.hint) for name in target_names())


def test_a_base_file_is_no_target() -> None:
    with pytest.raises(ConfigError, match="unknown target 'vllm-cuda'"):
        load_target("vllm-cuda")


def test_a_target_inherits_rules_and_replaces_rows() -> None:
    base, hopper = load_target("vllm-sm80"), load_target("vllm-sm90")
    assert base.fused == hopper.fused
    assert base.rows["w4a8-fp8"].refused
    assert hopper.rows["w4a8-fp8"].refused is None
    assert base.rows["nvfp4"] == hopper.rows["nvfp4"]


def test_a_dense_model_is_legal_everywhere() -> None:
    sites = [site("mlp.gate_proj", None), site("mlp.up_proj", None), Site("lm_head", 100, 512, structure="lm-head")]
    assert all(check(load_target(name), sites) == [] for name in target_names())
