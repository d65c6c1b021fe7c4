"""Token sequences, grouped into right-padded batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = 0  # any id the embedding has: padded positions are masked


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """`input_ids` int64 [B, S], right-padded; `token_mask` bool [B, S], true where a token is real."""

    input_ids: Tensor
    token_mask: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TokenData:
    """Batches, longest sequences first, and what became of the data on the way.

    `sequence_length` is the one used, after capping. `notes` says, in words for the user, where the data is not what
    was asked for. `fingerprint` is the SHA-256 over lengths and token ids of all sequences in order; it does not
    depend on how they are batched.
    """

    batches: tuple[TokenBatch, ...]
    sequences: int
    tokens: int
    sequence_length: int
    notes: tuple[str, ...]
    fingerprint: str

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: `sequence_length` or fewer."""
        return max(batch.input_ids.shape[1] for batch in self.batches)


def build(
    sequences: Sequence[Sequence[int]], *, batch_tokens: int, sequence_length: int, notes: Sequence[str]
) -> TokenData:
    """Batches of sequences of similar length: sorted by length (stable), so that padding is rare."""
    ordered = sorted(sequences, key=len, reverse=True)
    return TokenData(
        batches=tuple(_pad(group) for group in _groups(ordered, batch_tokens)),
        sequences=len(ordered),
        tokens=sum(map(len, ordered)),
        sequence_length=sequence_length,
        notes=tuple(notes),
        fingerprint=_fingerprint(ordered),
    )


def _groups(ordered: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[Sequence[Sequence[int]]]:
    start = 0
    while start < len(ordered):
        stop = start + max(1, batch_tokens // len(ordered[start]))
        yield ordered[start:stop]
        start = stop


def _pad(group: Sequence[Sequence[int]]) -> TokenBatch:
    lengths = torch.tensor([len(ids) for ids in group])
    token_mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.full(token_mask.shape, PADDING, dtype=torch.int64)
    input_ids[token_mask] = torch.tensor([token for ids in group for token in ids])
    return TokenBatch(input_ids, token_mask)


def _fingerprint(sequences: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(b"".join(token.to_bytes(8, "little") for token in ids))
    return digest.hexdigest()
