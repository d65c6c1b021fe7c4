"""Attention under the plain causal mask does not read it, and gives the same bits; any other mask is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from qcompiler.capture import capture_graph
from qcompiler.capture.compare import graph_logits, tensors_of
from qcompiler.data.batches import TokenBatch
from qcompiler.ir.graph import Graph
from qcompiler.ir.partition import partitions
from qcompiler.runtime import stream
from qcompiler.runtime.attention import attend_causally, is_causal, mask_of
from qcompiler.runtime.stream import Stream, always
from tests.compile.tiny import tiny_model

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
CPU = torch.device("cpu")


class Attentions(TorchDispatchMode):
    """Notes of every attention whether it was computed without a mask, as torch's own causal one."""

    def __init__(self) -> None:
        super().__init__()
        self.causal: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is FLASH:
            self.causal.append(len(args) > 4 and args[4] is True)
            assert self.causal[-1] == ((kwargs or {}).get("attn_mask") is None)
        return func(*args, **(kwargs or {}))


def causal(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def node(*args: Any, **kwargs: Any) -> fx.Node:
    """An attention; text among its arguments stands for nodes."""
    graph = fx.Graph()
    made = [graph.placeholder(arg) if isinstance(arg, str) else arg for arg in args]
    named = {name: graph.placeholder(arg) if isinstance(arg, str) else arg for name, arg in kwargs.items()}
    return graph.call_function(ATTENTION, tuple(made), named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "tokens", "size", "options"),
    [
        ((4, 4), 1, (32, 32), {}),
        ((4, 2), 37, (64, 64), {"scale": 0.3, "enable_gqa": True}),
        ((2, 2), 300, (64, 64), {"scale": 0.125}),
        ((2, 2), 530, (16, 16), {}),
        ((3, 3), 65, (48, 32), {}),  # values of another size: torch writes the product out
    ],
)
def test_the_bits_are_those_of_the_mask(
    dtype: torch.dtype, heads: tuple[int, int], tokens: int, size: tuple[int, int], options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = (
        torch.randn(2, tokens, count, width, generator=generator).mul(2).to(dtype).transpose(1, 2)
        for count, width in ((heads[0], size[0]), (heads[1], size[0]), (heads[1], size[1]))
    )
    mask = causal(tokens).expand(2, 1, -1, -1)
    call = node("q", "k", "v", "mask", **options)
    with Attentions() as seen:
        found = attend_causally(call, (query, key, value, mask))
    assert all(seen.causal)
    assert torch.equal(found, ATTENTION(query, key, value, mask, **options))


def test_a_mask_of_one_token_that_is_spread_over_many_is_kept() -> None:
    x = torch.randn(1, 2, 5, 16)
    found = attend_causally(node("q", "k", "v", "mask"), (x, x, x, causal(1)))
    assert torch.equal(found, ATTENTION(x, x, x))
    assert not torch.equal(found, ATTENTION(x, x, x, is_causal=True))


def test_a_mask_is_known_by_its_values() -> None:
    plain = causal(6)
    for mask in (plain, plain[None, None].expand(3, 2, 6, 6), plain.expand(3, 1, 6, 6).clone(), causal(1)):
        assert is_causal(mask)
    padded, one_differs = plain.clone(), plain.expand(3, 1, 6, 6).clone()
    padded[:, 0] = False
    one_differs[2, 0, 3, 1] = False
    others = (
        padded,
        one_differs,
        plain.triu(-2),  # a sliding window
        ~plain,
        torch.ones_like(plain),
        plain[:5],
        plain[:, :5],
        torch.zeros(6, 6).masked_fill(~plain, float("-inf")),
        plain.long(),
        plain[0],
        None,
    )
    assert not any(is_causal(mask) for mask in others)


def test_an_attention_that_the_mask_does_not_say_all_of_is_left_alone() -> None:
    for args, kwargs in (
        (("q", "k", "v", "mask"), {"scale": 0.5}),
        (("q", "k", "v", "mask", 0.0, False), {"enable_gqa": True}),
    ):
        found = mask_of(node(*args, **kwargs))
        assert found is not None
        assert found.name == "mask"
    for args, kwargs in (
        (("q", "k", "v"), {}),
        (("q", "k", "v", None), {}),
        (("q", "k", "v", "mask", 0.1), {}),
        (("q", "k", "v", "mask", "dropout"), {}),
        (("q", "k", "v", "mask", 0.0, True), {}),
        (("q", "k", "v", "mask"), {"dropout_p": 0.1}),
        (("q", "k", "v"), {"attn_mask": "mask"}),
    ):
        assert mask_of(node(*args, **kwargs)) is None
    assert mask_of(fx.Graph().placeholder("x")) is None


def test_layers_that_see_all_before_them_are_computed_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two layers has a window; short sequences see all before them in both."""
    model: Any = tiny_model("gemma3_text")
    assert (model.config.layer_types, model.config.sliding_window) == (["sliding_attention", "full_attention"], 4)
    graph = capture_graph(model)
    generator = torch.Generator().manual_seed(0)
    batches = [
        TokenBatch(torch.randint(3, 64, shape, generator=generator), torch.ones(shape, dtype=torch.bool))
        for shape in ((2, 20), (2, 20), (3, 4))
    ]
    looked: list[tuple[int, ...]] = []
    whether: Callable[[Any], bool] = is_causal
    monkeypatch.setattr(stream, "is_causal", lambda mask: (looked.append(tuple(mask.shape)), whether(mask))[1])
    tensors = tensors_of(graph, model)
    with Attentions() as seen:
        found = streamed(graph, batches, tensors)
    assert seen.causal == [False, False, True, True, True, True]  # layer by layer
    assert sorted(looked) == sorted([(2, 1, 20, 20), (3, 1, 4, 4)] * 2)  # two masks, each once for a shape
    with torch.no_grad():
        for batch, logits in zip(batches, found, strict=True):
            assert torch.equal(logits, graph_logits(graph, batch.input_ids, tensors))


def streamed(graph: Graph, batches: list[TokenBatch], tensors: dict[str, Tensor]) -> list[Tensor]:
    parts = partitions(graph)
    flow = Stream(graph, parts, batches, CPU)
    for part in parts:
        flow.run(part, part.nodes, tensors, always({}), keep=True)
    return flow.outputs()
