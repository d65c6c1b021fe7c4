"""In-place operations become operations on values, and the values stay the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from qcompiler.capture.functional import functionalize
from qcompiler.ir.fx import erase_dead, mutates, op_name


def traced(fn: Callable[[Tensor], Tensor], x: Tensor) -> fx.GraphModule:
    return make_fx(fn, tracing_mode="fake")(x)


def functional(fn: Callable[[Tensor], Tensor], x: Tensor) -> fx.GraphModule:
    module = traced(fn, x)
    functionalize(module.graph)
    erase_dead(module.graph)
    module.recompile()
    return module


def check(fn: Callable[[Tensor], Tensor], *, pure: bool = True) -> fx.GraphModule:
    x = torch.randint(-4, 5, (4, 6), generator=torch.Generator().manual_seed(0)).float()  # sums are exact in any order
    module = functional(fn, x)
    before = x.clone()
    assert torch.equal(module(x), fn(x.clone()))
    if pure:
        assert torch.equal(x, before)
        assert not any(mutates(node) for node in module.graph.nodes)
    return module


def test_a_buffer_that_is_filled_piece_by_piece() -> None:
    def fn(x: Tensor) -> Tensor:
        out = torch.empty(4, 6)
        out[:, :3].copy_(x[:, :3] * 2)
        out[:, 3:].copy_(x[:, 3:] + 1)
        return out

    names = {op_name(node) for node in check(fn).graph.nodes if node.op == "call_function"}
    assert "aten.slice_scatter" in names


def test_a_view_made_before_a_write_sees_it() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x + 1
        view = y[1:]
        y.mul_(3)
        view.add_(1)
        return y.sum(0) + view[0]

    check(fn)


@pytest.mark.parametrize(
    "view",
    [
        lambda y: y.transpose(0, 1),
        lambda y: y.permute(1, 0),
        lambda y: y.view(6, 4),
        lambda y: y.t(),
        lambda y: y.unsqueeze(1),
        lambda y: y.view(2, 2, 6).permute(2, 0, 1)[:, 1],
        lambda y: y.detach()[2],
        lambda y: y.contiguous(),
        lambda y: y.narrow(1, 2, 3),
        lambda y: y.narrow(0, -2, 2),
        lambda y: y.narrow(0, -3, 2),
        lambda y: y.swapaxes(0, 1)[1],
        lambda y: y.view(2, 2, 6).movedim(0, 2)[1],
        lambda y: y.view(2, 2, 6).movedim((0, 1), (1, 2))[3],
        lambda y: y.view_as(torch.empty(6, 4)),
        lambda y: y.diagonal(1),
    ],
)
def test_a_write_through_a_view_reaches_the_tensor(view: Callable[[Tensor], Tensor]) -> None:
    def fn(x: Tensor) -> Tensor:
        y = x * 2
        view(y).add_(5)
        return y

    check(fn)


def test_a_write_keeps_the_dtype_of_what_is_written() -> None:
    def fn(x: Tensor) -> Tensor:
        y = (x + 1).to(torch.bfloat16)
        y.add_(x)
        return y

    assert check(fn)(torch.ones(4, 6)).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "cut",
    [
        lambda y: torch.split(y, 4, dim=1),
        lambda y: torch.split(y, [1, 2, 3], dim=-1),
        lambda y: y.chunk(2),
        lambda y: y.tensor_split(3, dim=1),
        lambda y: y.tensor_split((1, 3)),
        lambda y: y.unbind(),
        lambda y: y.transpose(0, 1).unbind(1),
    ],
)
def test_a_write_through_a_part_of_several_reaches_the_tensor(cut: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    def fn(x: Tensor) -> Tensor:
        y = x * 2
        parts = cut(y)
        parts[1].add_(parts[0].sum())
        return y + parts[1].sum()

    check(fn)


def test_a_write_to_one_of_several_results_is_none_to_the_others() -> None:
    def fn(x: Tensor) -> Tensor:
        values, indices = x.topk(2)
        values.div_(values.sum(-1, keepdim=True) + 100)
        return values + indices

    check(fn)


def test_a_write_to_an_input_stays_in_place() -> None:
    module = functional(lambda x: x.add_(1), torch.zeros(2))
    x = torch.zeros(2)
    module(x)
    assert torch.equal(x, torch.ones(2))


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda y: y,
    lambda y: y[1:3],
    lambda y: y[:, 2],
    lambda y: y.transpose(0, 1),
    lambda y: y.view(3, 8),
    lambda y: y.transpose(0, 1)[1:4],
    lambda y: y.view(2, 2, 6)[1],
    lambda y: y.split([1, 3])[1],
    lambda y: y.unbind(1)[2],
]
WRITES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda v, x: v.add_(1),
    lambda v, x: v.mul_(x[0, 0]),
    lambda v, x: v.zero_(),
    lambda v, x: v.copy_(v * 2),
    lambda v, x: v.masked_fill_(v > 0, 0.5),
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(VIEWS), st.sampled_from(WRITES), st.booleans()), min_size=1, max_size=5))
def test_any_writes_through_any_views_give_the_same_values(
    steps: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor], bool]],
) -> None:
    def fn(x: Tensor) -> Tensor:
        y = x * 1.5
        early = [view(y) for view, _, _ in steps]
        total = x.sum()
        for (view, write, late), made in zip(steps, early, strict=True):
            written = write(view(y) if late else made, x)
            total = total + written.sum() + early[0].sum()
        return y + total

    check(fn)
