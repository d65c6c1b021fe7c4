"""Batching: what goes in comes out, padded on the right, in a stable order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.data.batches import TokenData, build

SEQUENCES = st.lists(st.lists(st.integers(0, 40_000), min_size=1, max_size=30), min_size=1, max_size=40)


def unpadded(data: TokenData) -> list[list[int]]:
    return [
        ids[mask].tolist()
        for batch in data.batches
        for ids, mask in zip(batch.input_ids, batch.token_mask, strict=True)
    ]


@given(sequences=SEQUENCES, batch_tokens=st.integers(1, 200))
def test_batches_hold_every_sequence_longest_first_within_the_token_budget(
    sequences: list[list[int]], batch_tokens: int
) -> None:
    data = build(sequences, batch_tokens=batch_tokens, sequence_length=30, notes=())
    assert unpadded(data) == sorted(sequences, key=lambda ids: -len(ids))
    assert (data.sequences, data.tokens) == (len(sequences), sum(map(len, sequences)))
    for batch in data.batches:
        assert batch.input_ids.dtype == torch.int64
        assert batch.token_mask.dtype == torch.bool
        assert batch.input_ids.shape == batch.token_mask.shape
        assert batch.input_ids.numel() <= batch_tokens or len(batch.input_ids) == 1
        assert batch.token_mask[:, 0].all()
        assert bool((batch.token_mask[:, :-1] >= batch.token_mask[:, 1:]).all()), "padding is on the right only"
        assert not batch.input_ids[~batch.token_mask].any()
        assert batch.token_mask.any(0).all(), "no column is padding throughout"


@given(sequences=SEQUENCES, budgets=st.tuples(st.integers(1, 200), st.integers(1, 200)))
def test_fingerprint_does_not_depend_on_batching(sequences: list[list[int]], budgets: tuple[int, int]) -> None:
    one, other = (build(sequences, batch_tokens=b, sequence_length=30, notes=()).fingerprint for b in budgets)
    assert one == other


def fingerprint(*sequences: list[int]) -> str:
    return build(sequences, batch_tokens=64, sequence_length=8, notes=()).fingerprint


def test_fingerprint_tells_tokens_boundaries_and_order_apart() -> None:
    variants = [
        fingerprint([1, 2, 3], [4, 5, 6]),
        fingerprint([1, 2, 3], [4, 5, 7]),
        fingerprint([4, 5, 6], [1, 2, 3]),
        fingerprint([1, 2, 3, 4], [5, 6]),
        fingerprint([1, 2, 3, 4, 5, 6]),
        fingerprint([1, 2, 3], [4, 5, 6, 0]),
    ]
    assert len(set(variants)) == len(variants)
