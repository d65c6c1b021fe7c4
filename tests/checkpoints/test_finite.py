"""NaN and infinity are found in bytes that are only copied."""

from __future__ import annotations

import pytest
import torch

from qcompiler.checkpoints.finite import FiniteTensor, check_finite
from qcompiler.checkpoints.header import TensorMeta
from qcompiler.checkpoints.memory import LoadedTensors
from qcompiler.errors import CheckpointError


class Chunks(LoadedTensors):
    """One tensor, handed over in chunks of any length."""

    def __init__(self, tensor: torch.Tensor, size: int) -> None:
        self._state = {"w": tensor}
        self.origin = "test"
        self._size = size
        self.tensors = {"w": TensorMeta("w", tensor.dtype, tuple(tensor.shape), "test", 0)}

    def copy_bytes(self, key, write):
        data = self._state[key].view(torch.uint8).numpy().tobytes()
        for start in range(0, len(data), self._size):
            write(data[start : start + self._size])


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_arrive_as_they_were_whatever_the_chunks(dtype: torch.dtype, size: int) -> None:
    values = torch.cat([torch.randn(40), torch.tensor([0.0, -0.0, 1e-8, 60000.0])]).to(dtype)
    written: list[bytes] = []
    FiniteTensor(Chunks(values, size), "w").copy_bytes(written.append)
    assert b"".join(written) == values.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_is_an_error(dtype: torch.dtype, size: int, bad: float) -> None:
    values = torch.randn(40).to(dtype)
    values[-1] = bad
    with pytest.raises(CheckpointError, match="w has NaN or infinite values"):
        FiniteTensor(Chunks(values, size), "w").copy_bytes(lambda chunk: None)
    with pytest.raises(CheckpointError, match=r"w in .* has NaN or infinite values"):
        check_finite("w", values, "test")


def test_integers_and_empty_tensors_are_not_looked_at() -> None:
    FiniteTensor(Chunks(torch.full((4,), -1), 8), "w").copy_bytes(lambda chunk: None)
    check_finite("w", torch.empty(0), "test")
    check_finite("w", torch.tensor([1]), "test")
