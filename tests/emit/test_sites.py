"""From linears to the modules that a runtime builds of them."""

from __future__ import annotations

from qcompiler.emit.sites import Site, runtime_modules
from tests.emit.models import mixture

FUSED = {"qkv_proj": [["q_proj", "k_proj", "v_proj"]], "kv_proj": [["k_proj", "v_proj"]]}


def names(sites: list[str]) -> list[tuple[str, int]]:
    return [(m.name, len(m.sites)) for m in runtime_modules([Site(name, 1, 1) for name in sites], FUSED)]


def test_the_longest_fusion_wins_and_keeps_its_shard_order() -> None:
    assert names(["a.v_proj", "a.o_proj", "a.q_proj", "a.k_proj"]) == [("a.qkv_proj", 3), ("a.o_proj", 1)]
    (module, _) = runtime_modules([Site(f"a.{leaf}_proj", 1, 1) for leaf in "vkqo"], FUSED)
    assert [site.leaf for site in module.sites] == ["q_proj", "k_proj", "v_proj"]


def test_a_fusion_that_is_whole_beats_one_that_is_not() -> None:
    assert names(["a.k_proj", "a.v_proj"]) == [("a.kv_proj", 2)]


def test_one_shard_alone_and_a_module_that_is_fused_already_stay_as_they_are() -> None:
    assert names(["a.q_proj", "b.k_proj"]) == [("a.q_proj", 1), ("b.k_proj", 1)]
    assert names(["a.qkv_proj"]) == [("a.qkv_proj", 1)]


def test_experts_of_a_layer_are_one_module_and_shared_experts_are_not() -> None:
    modules = runtime_modules(mixture(lambda name: None, layers=2, experts=4), {})
    blocks = [m for m in modules if m.is_expert_block]
    assert [(m.name, len(m.sites)) for m in blocks] == [("model.layers.1.mlp.experts", 12)]
    assert any(m.name == "model.layers.1.mlp.shared_experts.up_proj" for m in modules)


def test_top_level_linears_have_no_parent() -> None:
    assert (Site("lm_head", 1, 1).parent, Site("lm_head", 1, 1).leaf) == ("", "lm_head")
    assert names(["q_proj", "k_proj"]) == [("qkv_proj", 2)]
