"""Over the zoo: where scales can move, that it is the same under any names, and that moving them changes nothing."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from qcompiler.ir.annotations import Leaf, LeafKind, Role, need
from qcompiler.ir.graph import Graph
from qcompiler.patterns.language import NearMiss
from qcompiler.patterns.rescaling import RescaleSite, rescale_sites
from qcompiler.transforms.fold import fold
from tests.capture.conftest import MEMBERS, Member
from tests.renaming import renamed

Sites = tuple[tuple[RescaleSite, ...], tuple[NearMiss, ...]]


@pytest.fixture(scope="session")
def sites(member: Member) -> Sites:
    """The sites and near misses of a member of the zoo."""
    return rescale_sites(member.captured)


SPLIT = {
    "input_layernorm -> q_proj k_proj v_proj",
    "v_proj -> o_proj",
    "post_attention_layernorm -> gate_proj up_proj",
    "up_proj -> down_proj",
}
SANDWICH = {
    "input_layernorm -> q_proj k_proj v_proj",
    "v_proj => o_proj",
    "pre_feedforward_layernorm -> gate_proj up_proj",
    "up_proj -> down_proj",
}
PARALLEL = {"input_layernorm -> q_proj k_proj v_proj gate_proj up_proj", "v_proj -> o_proj", "up_proj -> down_proj"}
LATENT = {
    "input_layernorm -> q_a_proj kv_a_proj_with_mqa",
    "q_a_layernorm -> q_b_proj",
    "kv_a_layernorm -> kv_b_proj",
    "kv_b_proj -> o_proj",
    "up_proj -> down_proj",
}
GATED = {"input_layernorm -> q_proj k_proj v_proj gate_proj", "v_proj -> o_proj", "up_proj -> down_proj"}
DENSE = "post_attention_layernorm -> gate_proj up_proj"

EXPECTED: dict[str, tuple[set[str], ...]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma"), (SPLIT,)),
    **dict.fromkeys(("gemma2", "gemma3_text"), (SANDWICH,)),
    **dict.fromkeys(("cohere", "cohere2"), (PARALLEL,)),
    "mixtral": ({"input_layernorm -> q_proj k_proj v_proj", "v_proj => o_proj"},),  # experts read the other norm
    "deepseek_v2": (LATENT,),
    "deepseek_v3": (LATENT | {DENSE}, LATENT),  # first dense, then shared and routed experts
    "afmoe": (GATED | {"pre_mlp_layernorm -> gate_proj up_proj"}, GATED),
    "olmo": ({"v_proj -> o_proj", "up_proj -> down_proj"},),  # its norms have no weights
    "olmo2": ({"v_proj -> o_proj", "up_proj -> down_proj"},),  # its norms come last, before the residual
    "opt": (
        {
            "self_attn_layer_norm -> q_proj k_proj v_proj",
            "v_proj -> out_proj",
            "final_layer_norm -> fc1",
            "fc1 -> fc2",
        },
    ),
    "phi": ({"input_layernorm -> q_proj k_proj v_proj fc1", "v_proj -> dense"},),
    "phi3": (
        {
            "input_layernorm -> qkv_proj",
            "qkv_proj -> o_proj",
            "post_attention_layernorm -> gate_up_proj",
            "gate_up_proj -> down_proj",
        },
    ),
    "gpt_neox": (
        {
            "input_layernorm -> query_key_value",
            "query_key_value -> dense",
            "post_attention_layernorm -> dense_h_to_4h",
        },
    ),
    "falcon": ({"input_layernorm -> query_key_value dense_h_to_4h", "query_key_value => dense"},),
    "falcon-40b": ({"ln_attn -> query_key_value", "query_key_value => dense", "ln_mlp -> dense_h_to_4h"},),
    "falcon-11b": ({"input_layernorm -> query_key_value dense_h_to_4h", "query_key_value => dense"},),
    "falcon-rw-1b": (
        {
            "input_layernorm -> query_key_value",
            "query_key_value -> dense",
            "post_attention_layernorm -> dense_h_to_4h",
        },
    ),
    "dbrx": ({"norm_1 -> Wqkv"},),  # queries, keys and values are clamped
    "gpt2": (),
}
"""The sites of each kind of layer of a family; `=>` where features share a channel (grouped queries)."""


def words(site: RescaleSite) -> str:
    producer, *consumers = (need(n, Leaf).path.rpartition(".")[2] for n in (site.producer, *site.consumers))
    return f"{producer} {'=>' if site.tied else '->'} {' '.join(consumers)}"


def layers(sites: tuple[RescaleSite, ...]) -> list[set[str]]:
    """The sites of each kind of layer, each kind once, in order."""
    found: dict[int, set[str]] = defaultdict(set)
    for site in sites:
        layer = need(site.producer, Role).layer
        if layer is not None:
            found[layer].add(words(site))
    kinds: list[set[str]] = []
    for index in sorted(found):
        if found[index] not in kinds:
            kinds.append(found[index])
    return kinds


def test_layers_of_known_families_have_their_sites(member: Member, sites: Sites) -> None:
    if member.model_type in EXPECTED:
        assert layers(sites[0]) == list(EXPECTED[member.model_type])


def test_known_families_are_in_the_zoo() -> None:
    assert set(EXPECTED) <= set(MEMBERS)


def test_every_linear_is_rescaled_or_says_why_not(member: Member, sites: Sites) -> None:
    found, misses = sites
    rescaled = [node for site in found for node in site.consumers]
    assert len(set(rescaled)) == len(rescaled)
    linears = {n for n, leaf in member.captured.leaves() if leaf.is_linear or leaf.kind is LeafKind.EXPERTS}
    assert linears - set(rescaled) == {miss.anchor for miss in misses}
    assert all(miss.why for miss in misses)


def summary(graph: Graph, sites: Sites) -> list[tuple[object, ...]]:
    """What sites and near misses say, names aside."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    found = [
        (
            *(s.id, s.kind, s.channels.tolist(), [gain.offset for gain in s.gains]),
            [order[node] for node in (s.producer, *s.consumers, s.tensor)],
        )
        for s in sites[0]
    ]
    return [*found, *((order[miss.anchor], miss.held) for miss in sites[1])]


def test_sites_are_the_same_under_any_names(member: Member, sites: Sites) -> None:
    other = renamed(member.captured, seed=2)
    assert summary(other, rescale_sites(other)) == summary(member.captured, sites)


FLOAT32_ONLY = ("xglm",)
"""Members whose own code cannot run in float64."""


def test_folding_every_site_at_once_changes_no_logit(member: Member, sites: Sites) -> None:
    narrow = member.model_type in FLOAT32_ONLY
    twin = copy.deepcopy(member.twin).to(torch.float32 if narrow else torch.float64)
    twin.set_experts_implementation("eager")  # the other ways have no float64
    ids = torch.randint(3, twin.config.vocab_size - 1, (2, 7), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {name: p.data for name, p in twin.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        before = twin(input_ids=ids, use_cache=False).logits
        for site in sites[0]:
            scale = torch.rand(int(site.channels.max()) + 1, generator=generator) * 3.5 + 0.25
            fold(site, scale[site.channels], weights)
        for name, parameter in twin.named_parameters(remove_duplicate=False):
            parameter.data = weights[name]
        after = twin(input_ids=ids, use_cache=False).logits
    rounding = 1e-3 if narrow else 1e-5  # many norms compute in float32 whatever they are given
    assert (after - before).abs().max() < rounding * before.std()
