"""How norms take a scale: by which of their parameters, and whether plus one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompiler.transforms.norms import norm_gains

CHANNELS = 8


class Written(nn.Module):
    """A root-mean-square norm whose output is `then(normalized, parameters)`; names say nothing."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.ParameterList([nn.Parameter(torch.empty(shape)) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # as models do
        return self.then((wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype), *self.table)

    def then(self, x: Tensor, *parameters: Tensor) -> Tensor:
        raise NotImplementedError


class Plain(Written):
    def then(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return x * parameters[0]


class PlusOne(Written):
    def then(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return x * (1 + parameters[0]) + parameters[1]


class Squared(Written):
    def then(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return x * parameters[0] ** 2


class Shifted(Written):
    """Divided with its weights but for what it adds."""

    def then(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return x * parameters[0] + 1


class Reversed(Written):
    def then(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return x * parameters[0].flip(0)


class OnDevice(Written):
    def then(self, x: Tensor, *parameters: Tensor) -> Tensor:
        raise RuntimeError("only on a GPU")


ONE, TWO = ((CHANNELS,),), ((CHANNELS,), (CHANNELS,))


@pytest.mark.parametrize(
    ("norm", "offsets"),
    [
        (nn.RMSNorm(CHANNELS), [0.0]),
        (nn.LayerNorm(CHANNELS), [0.0, 0.0]),
        (nn.LayerNorm(CHANNELS, bias=False), [0.0]),
        (Plain(*ONE), [0.0]),
        (PlusOne(*TWO), [1.0, 0.0]),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_form_of_a_norm_is_found_by_running_it(norm: nn.Module, offsets: list[float], device: str) -> None:
    gains = norm_gains(norm.to_empty(device=device), "a.b", CHANNELS)
    assert not isinstance(gains, str)
    assert [gain.name for gain in gains] == [f"a.b.{name}" for name, _ in norm.named_parameters()]
    assert [gain.offset for gain in gains] == offsets


def with_buffer() -> nn.Module:
    norm = nn.RMSNorm(CHANNELS)
    norm.register_buffer("temperature", torch.ones(1))
    return norm


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (nn.LayerNorm(CHANNELS, elementwise_affine=False), "it has no weight"),
        (with_buffer(), "it depends on a buffer"),
        (Plain((1,)), "its parameters are not one number per channel"),
        (Squared(*ONE), "its output is not divided when its parameters are"),
        (Shifted(*ONE), "its output is not divided when its parameters are"),
        (Reversed(*ONE), "its output is not divided when its parameters are"),
        (OnDevice(*ONE), "it cannot be run by itself on the CPU: RuntimeError"),
    ],
)
def test_a_norm_that_takes_no_scale_says_why(norm: nn.Module, why: str) -> None:
    assert norm_gains(norm, "norm", CHANNELS) == why
