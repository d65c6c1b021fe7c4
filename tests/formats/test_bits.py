from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qcompiler.formats.bits as bits_module
from qcompiler.formats.bits import pack_nibbles, pack_words, packed_words, unpack_nibbles, unpack_words
from qcompiler.numerics.elements import decode
from qcompiler.scheme import preset

BITS = range(2, 9)


def random_codes(bits: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8)


@given(st.sampled_from(BITS), st.integers(1, 9), st.integers(1, 150), st.integers(0, 999))
def test_packing_equals_the_librarys_and_comes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes(bits, rows, columns, seed)
    packed = pack_words(codes, bits)
    assert packed.shape == (rows, packed_words(columns, bits))
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_words(packed, bits, columns), codes)
    assert torch.equal(unpack_words(packed, bits, columns), unpack_from_int32(packed, bits, codes.shape))


@pytest.mark.parametrize("bits", BITS)
def test_element_i_lies_at_bit_i_times_bits(bits: int) -> None:
    codes = random_codes(bits, 1, 37)
    stream = sum((int(q) + 2 ** (bits - 1)) << (i * bits) for i, q in enumerate(codes[0].tolist()))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(packed_words(37, bits))]
    assert [int(w) & 0xFFFFFFFF for w in pack_words(codes, bits)[0].tolist()] == words


@pytest.mark.parametrize("bits", BITS)
def test_rows_packed_in_parts_are_the_same(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(bits, 23, 70)
    whole = pack_words(codes, bits)
    monkeypatch.setattr(bits_module, "_PART_ELEMENTS", 300)
    assert torch.equal(pack_words(codes, bits), whole)
    assert torch.equal(unpack_words(whole, bits, 70), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(12, 20), (32, 1), (1, 32), (64, 1)])
def test_a_transposed_view_packs_as_its_copy(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(bits, *shape)
    expected = pack_words(codes.T.clone(memory_format=torch.contiguous_format), bits)
    assert torch.equal(pack_words(codes.T, bits), expected)
    assert torch.equal(unpack_words(expected.T.contiguous().T, bits, shape[0]), codes.T)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 999))
def test_nibbles_equal_the_librarys_fp4_and_come_back(rows: int, pairs: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, 2 * pairs), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    values = decode(codes, preset("NVFP4").weights, torch.bfloat16)
    packed = pack_nibbles(codes)
    assert torch.equal(packed, pack_fp4_to_uint8(values))
    assert torch.equal(unpack_nibbles(packed), codes)
    assert torch.equal(unpack_fp4_from_uint8(packed, rows, 2 * pairs), values)
