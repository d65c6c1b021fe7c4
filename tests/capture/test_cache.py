"""Over the zoo: what is found to enter the key/value cache is what enters it, or the family is refused and says why."""

from __future__ import annotations

import pytest
import torch

from qcompiler.capture import capture_graph
from qcompiler.capture.cache import compare_cached, prove_cached
from qcompiler.capture.twin import build_twin
from qcompiler.errors import LegalityError
from qcompiler.ir.edit import stand_between
from qcompiler.ir.graph import Graph
from qcompiler.patterns.cache import cached_tensors
from tests.capture.conftest import MEMBERS, Member
from tests.capture.models import on_meta
from tests.renaming import renamed
from tests.zoo import tiny_config

LATENT = "makes the values of .* of a latent, .*, and it is the latent that runtimes cache"
REFUSED = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "hy_v4", "longcat_flash", "minicpm3", "youtu"), LATENT),
    "deepseek_v4": r"something else than the key of \S*: \[3, 1, 13, 32\] enters it and \[3, 1, 16, 32\] is read",
    "gpt_neox_japanese": r"is not \[batch, heads, tokens, features\]",
    "jetmoe": "no attention whose keys and values are found",  # its queries come out of experts
    "openai-gpt": "its right side is no transposition of keys",
    "xlm": "puts 0 tensors into it where its attention reads 4",
    "zaya": "no attention whose keys and values are found",  # its keys come out of convolutions
}
"""Families whose cache is not quantized, and words of the message that says so."""


def test_what_enters_the_cache_is_found_or_refused_for_its_reason(member: Member) -> None:
    expected = REFUSED.get(member.model_type)
    if expected is None:
        compare_cached(member.captured, member.twin)
        return
    with pytest.raises(LegalityError, match=expected) as error:
        compare_cached(member.captured, member.twin)
    assert error.value.hint == "take out kv_cache (kv_cache_scheme in a recipe)"


def test_families_that_are_refused_are_in_the_zoo() -> None:
    assert REFUSED.keys() <= set(MEMBERS)


def found(graph: Graph) -> list[tuple[str, int]] | bool:
    """Where keys and values are found, names aside; where they are refused, whether for a latent."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    try:
        return [(cached.part, order[cached.node]) for cached in cached_tensors(graph)]
    except LegalityError as error:
        return "of a latent" in error.message


def test_the_same_is_found_under_any_names(member: Member) -> None:
    assert found(renamed(member.captured, seed=3)) == found(member.captured)


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("change", [torch.ops.aten.neg.default, torch.ops.aten.square.default])
def test_what_changes_between_cache_and_attention_is_seen(part: str, change: torch._ops.OpOverload) -> None:
    graph = capture_graph(on_meta("llama"))
    prove_cached(graph)
    node = [cached.node for cached in cached_tensors(graph) if cached.part == part][-1]
    stand_between(graph, node, change)
    with pytest.raises(LegalityError, match=rf"than the {part} of model.layers.1.self_attn: other numbers of the same"):
        prove_cached(graph)


def test_a_model_that_no_short_run_shows_is_proved_through_its_twin() -> None:
    prove_cached(capture_graph(on_meta("mistral", layers=5, vocab_size=400_000)))


def test_a_model_that_does_not_run_with_a_cache_is_refused() -> None:
    twin = build_twin(tiny_config("llama"))
    graph = capture_graph(twin)
    del twin.model.layers[1].self_attn.layer_idx
    with pytest.raises(LegalityError, match="LlamaForCausalLM does not run with one: AttributeError"):
        prove_cached(graph)
