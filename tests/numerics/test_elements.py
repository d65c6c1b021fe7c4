from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.numerics.elements import FP4_VALUES, FP8, decode, round_to_codes, round_to_values
from qcompiler.scheme import QuantSpec, Strategy, preset

FP4 = preset("MXFP4").weights
E4M3 = preset("FP8_DYNAMIC").weights


def every_bfloat16() -> torch.Tensor:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    return values[~values.isnan()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp4_rounds_every_bfloat16_as_the_library_does(dtype: torch.dtype) -> None:
    x = every_bfloat16().to(dtype)
    expected = FP4_E2M1_DATA.cast_to_fp4(x.clone())
    assert torch.equal(round_to_values(x.clone(), FP4), expected)
    codes = round_to_codes(x.float(), FP4)
    assert torch.equal(decode(codes, FP4, dtype), expected)


def test_fp4_ties_go_to_the_even_code_and_their_neighbours_to_the_nearer() -> None:
    values = torch.tensor(FP4_VALUES)
    ties = (values[1:] + values[:-1]) / 2
    codes = torch.arange(7, dtype=torch.uint8)
    even = codes + codes % 2
    assert torch.equal(round_to_codes(ties.clone(), FP4), even)
    below, above = ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(9.0))
    assert torch.equal(round_to_codes(below, FP4), codes)
    assert torch.equal(round_to_codes(above, FP4), codes + 1)


def test_fp8_rounds_every_bfloat16_as_torch_does() -> None:
    x = every_bfloat16().float().clamp(-448, 448)
    assert torch.equal(round_to_values(x.clone(), E4M3), x.to(FP8).float())
    assert torch.equal(round_to_codes(x.clone(), E4M3).float(), x.to(FP8).float())


@given(st.floats(-448, 448, width=32))
def test_fp8_rounds_any_float32_as_torch_does(x: float) -> None:
    value = torch.tensor([x])
    assert torch.equal(round_to_values(value.clone(), E4M3), value.to(FP8).float())


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_round_half_to_even_and_saturate(bits: int) -> None:
    spec = QuantSpec(bits=bits, strategy=Strategy.CHANNEL)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = torch.tensor([-1e9, low - 0.5, -1.5, -0.5, 0.5, 0.51, 1.4, high + 0.49, 1e9])
    expected = torch.tensor([low, low, max(-2, low), 0, 0, 1, 1, high, high]).float()
    assert torch.equal(round_to_values(x, spec), expected)


def test_decode_gives_every_fp8_value_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    finite = ~codes.float().isnan()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(decode(codes, E4M3, dtype)[finite], codes.to(dtype)[finite])
        assert decode(codes, E4M3, dtype)[~finite].isnan().all()
