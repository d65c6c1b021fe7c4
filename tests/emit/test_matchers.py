"""Each loader's matching, on the configs that they read differently, and against their own functions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.utils import match
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.compressed_tensors import get_experts_scheme

from qcompiler.emit import matchers
from qcompiler.emit.matchers import Assignment, Resolution, assignment
from qcompiler.emit.patterns import TargetList
from qcompiler.emit.sites import Site
from qcompiler.errors import ConfigError
from qcompiler.scheme import preset
from tests.emit.models import llama, mixture

FUSED = {"qkv_proj": [["q_proj", "k_proj", "v_proj"]], "gate_up_proj": [["gate_proj", "up_proj"]]}
LAYER = "model.layers.0"


def config(*groups: list[str], ignore: tuple[str, ...] = ()) -> dict[str, Any]:
    weights = [{"num_bits": bits, "type": "int", "strategy": "channel"} for bits in (4, 8, 3)]
    named = {f"group_{i}": {"targets": t, "weights": w} for i, (t, w) in enumerate(zip(groups, weights, strict=False))}
    return {"config_groups": named, "ignore": list(ignore)}


def assign(loader: str, config: dict[str, Any], sites: list[Site] | None = None) -> Assignment:
    return assignment(loader, config, sites or llama(lambda name: None, layers=1), FUSED)


def errors(result: Assignment) -> list[Resolution]:
    return [resolution for resolution in result.resolutions if resolution.error is not None]


def test_vllm_tries_an_expression_on_the_fused_name_first() -> None:
    groups = assign("vllm", config([r"re:.*[^_]up_proj$|re:x"], ["re:.*up_proj$"], ["re:.*gate_proj$"])).groups
    assert groups[f"{LAYER}.mlp.gate_proj"] == groups[f"{LAYER}.mlp.up_proj"] == "group_1"
    ours = config(["re:.*up_proj$"], ["re:.*gate_proj$"])
    assert assign("transformers", ours).groups[f"{LAYER}.mlp.gate_proj"] == "group_1"


def test_vllm_takes_the_first_shards_group_and_says_nothing() -> None:
    result = assign("vllm", config([r"re:.*\.gate_proj$"], [r"re:.*\.up_proj$"]))
    assert result.groups[f"{LAYER}.mlp.up_proj"] == "group_0"
    assert not errors(result)


def test_vllm_leaves_a_fused_module_dense_when_one_shard_matches_nothing() -> None:
    groups = assign("vllm", config([r"re:.*\.(q|k)_proj$"])).groups
    assert groups[f"{LAYER}.self_attn.q_proj"] is None


def test_vllm_raises_when_ignore_covers_some_shards() -> None:
    result = assign("vllm", config(["Linear"], ignore=(f"{LAYER}.self_attn.k_proj", "lm_head")))
    (error,) = errors(result)
    assert error.module.name == f"{LAYER}.self_attn.qkv_proj"
    assert str(error.error).startswith("ValueError: Found different quantization schemes for the shards of")


def test_overlapping_targets_split_the_loaders() -> None:
    overlapping = config(["re:.*"], [f"{LAYER}.mlp.down_proj"])
    name = f"{LAYER}.mlp.down_proj"
    assert assign("vllm", overlapping).groups[name] == "group_0"
    assert assign("transformers", overlapping).groups[name] == "group_1"


def test_linear_covers_the_head_in_transformers_alone() -> None:
    everything = config(["Linear"])
    assert assign("transformers", everything).groups["lm_head"] == "group_0"
    assert assign("vllm", everything).groups["lm_head"] is None
    assert assign("sglang", everything).groups["lm_head"] is None


def test_sglang_takes_classes_before_shards() -> None:
    overridden = config(["Linear"], [r"re:.*\.(q|k|v)_proj$"])
    name = f"{LAYER}.self_attn.q_proj"
    assert assign("sglang", overridden).groups[name] == "group_0"
    assert assign("vllm", overridden).groups[name] == "group_1"


def test_sglang_raises_for_a_linear_in_neither_targets_nor_ignore() -> None:
    result = assign("sglang", config([r"re:.*\.down_proj$"]))
    assert {error.module.name.rpartition(".")[2] for error in errors(result)} == {"qkv_proj", "o_proj", "gate_up_proj"}
    assert all("Unable to find matching target" in str(error.error) for error in errors(result))


def test_sglang_releases_read_ignore_as_substring_or_suffix() -> None:
    sites = [Site(f"{LAYER}.mlp.gate", 4, 4), Site(f"{LAYER}.mlp.gate_proj", 4, 4)]
    loose = config([r"re:.*\.gate_proj$"], ignore=(f"{LAYER}.mlp.gate",))
    name = f"{LAYER}.mlp.gate_proj"
    assert assign("sglang", loose, sites).groups[name] == "group_0"
    assert assign("sglang-substring", loose, sites).groups[name] is None
    suffix = config(["re:.*"], ignore=("mlp.gate_proj",))
    assert assign("sglang", suffix, sites).groups[name] is None
    assert assign("vllm", suffix, sites).groups[name] == "group_0"


def test_ignored_class_names_count_in_transformers_alone() -> None:
    ignoring = config(["re:.*"], ignore=("Linear",))
    assert set(assign("transformers", ignoring).groups.values()) == {None}
    assert assign("vllm", ignoring).groups[f"{LAYER}.mlp.down_proj"] == "group_0"


def test_a_subclass_of_linear_counts_as_linear() -> None:
    sites = [Site("a.b", 4, 4, class_name="FalconLinear"), Site("a.c", 4, 4, class_name="Conv1D", kind="conv1d")]
    assert assign("transformers", config(["Linear"]), sites).groups == {"a.b": "group_0", "a.c": None}


def test_experts_follow_expert_zero_and_the_experts_class() -> None:
    sites = mixture(lambda name: preset("W4A16"), layers=2)
    name = "model.layers.1.mlp.experts.2.up_proj"
    assert (
        assign("vllm", config([r"re:.*experts\.0\..*"], [r"re:.*experts\.[12]\..*"]), sites).groups[name] == "group_0"
    )
    assert assign("vllm", config(["Linear"]), sites).groups[name] == "group_0"
    assert assign("sglang", config(["Linear"]), sites).groups[name] == "group_0"


def test_experts_of_two_schemes_raise_in_the_servers() -> None:
    sites = mixture(lambda name: preset("W4A16"), layers=2)
    split = config([r"re:.*\.(gate|up|gate_up)_proj$", r"re:.*mlp\.gate$"], [r"re:.*\.(q|k|v|o|qkv|down)_proj$"])
    for loader in ("vllm", "sglang"):
        (error,) = errors(assign(loader, split, sites))
        assert error.module.is_expert_block
        assert "All MoE projections need to have same quantization scheme" in str(error.error)


def test_sglang_knows_experts_by_three_names_only() -> None:
    sites = [Site(f"{LAYER}.moe.experts.0.{leaf}", 4, 4, kind="experts") for leaf in ("w1", "w2", "w3")]
    named = config([r"re:.*\.w[123]$"])
    assert not errors(assign("vllm", named, sites))
    assert "gate_proj" in str(errors(assign("sglang", named, sites))[0].error)


def test_a_repeated_target_keeps_its_place_and_takes_the_later_group() -> None:
    assert matchers.group_of_target(config(["a", "b"], ["a"])) == {"a": "group_1", "b": "group_0"}
    assert list(matchers.group_of_target(config(["a", "b"], ["a"]))) == ["a", "b"]


def test_attention_groups_are_nothing_to_vllm() -> None:
    groups = assign("vllm", config(["LlamaAttention"], [r"re:.*\.o_proj$"])).groups
    assert groups[f"{LAYER}.self_attn.o_proj"] == "group_1"


def test_an_unknown_loader_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown loader 'vlm'; did you mean 'vllm'"):
        assign("vlm", config(["Linear"]))


NAMES = st.sampled_from([f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("mlp.up_proj", "attn.q_proj", "gate")])
TARGETS = st.lists(
    st.one_of(
        NAMES,
        st.sampled_from(
            ["Linear", "Module", "re:.*", r"re:.*\.up_proj$", "re:.*proj", "re:up_proj", r"re:model\.layers\.1", "gate"]
        ),
    ),
    max_size=6,
    unique=True,
)


@given(NAMES, TARGETS, TARGETS)
def test_the_library_matches_and_ignores_the_same_modules(name: str, targets: list[str], ignore: list[str]) -> None:
    linear = torch.nn.Linear(1, 1, device="meta")
    classes = [cls.__name__ for cls in type(linear).__mro__]
    theirs = next(iter(match.match_targets(name, linear, targets)), None)
    assert matchers.transformers_matched_target(name, classes, matchers.transformers_order(targets)) == theirs
    assert matchers.transformers_ignores(name, classes, TargetList(ignore)) == match.is_match(name, linear, ignore)


@given(st.lists(TARGETS.filter(bool), min_size=1, max_size=3))
def test_transformers_gives_the_experts_the_same_group(groups: list[list[str]]) -> None:
    named = {f"group_{i}": SimpleNamespace(name=f"group_{i}", targets=targets) for i, targets in enumerate(groups)}
    ours = matchers.transformers_experts_group(config(*groups))
    assert ours == get_experts_scheme(SimpleNamespace(config_groups=named)).name
