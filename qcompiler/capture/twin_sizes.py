"""Shrinking a config's sizes by what they mean, so that what was equal, divisible or a sum stays so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from transformers import PreTrainedConfig

from qcompiler.capture.twin_fields import entry, fields, named, rope_tables
from qcompiler.errors import CaptureError

_HEADS = re.compile(
    r"(\w+_)?(num|n)_(\w+_)?heads?(_per_layer)?|(kv_)?n_heads?|(decoder_|encoder_)?attention_heads"
    r"|num_query_groups|multi_query_group_num|o_groups"
)
_HEAD_DIM = re.compile(r"(\w+_)?head_dim|d_head|dim_head|attention_head_size|kv_channels|rotary_dim")
_WIDTH = re.compile(
    r"(\w+_)?(hidden_size|intermediate_size|ffn_hidden_size|embedding_size|feed_forward_size|latent_size)(_\w+)?"
    r"|(\w+_)?(ffn_dim|embed_dim|embedding_dim|emb_dim|proj_dim|lora_rank|lowrank|adapter_rank|norm_rank|laurel_rank)"
    r"|d_model|d_inner|n_embd|n_inner|dff|dim_ff|lru_width|intermediate_size_mlp"
)
_EXPERTS = re.compile(r"num_local_experts|(moe_)?num_experts|n_routed_experts|zero_expert_num")
_TOP_K = re.compile(r"(num_)?experts_per_(tok|token)|(moe_)?num_experts_per_tok|moe_k|moe_top_?k|top_k_experts")
_GROUPS = re.compile(r"n_group|num_expert_group")
_TOP_GROUPS = re.compile(r"topk_group")
_VOCAB = re.compile(r"(?!type_vocab)(\w+_)?vocab_size(_\w+)?")
_TOKEN_ID = re.compile(r"(\w+_)?token_(id|index)")
_POSITIONS = re.compile(r"max_position_embeddings|n_positions|max_seq_len|n_ctx")
_THRESHOLD = re.compile(
    r"sliding_window(_size)?|(attention_|keep_)?window_size|local_attention|attention_chunk_size"
    r"|floor_scale|log_scaling_n_floor|index_topk|compress_rates"
)

_VOCAB_SIZE = 320
_MAX_POSITIONS = 4096
_REACH = 4
"""Windows, chunks and other thresholds counted in tokens: small, so that a short sequence crosses them."""


def shrink_sizes(config: PreTrainedConfig) -> None:
    """Shrinks, in place, every size of `config` but its number of layers."""
    _shrink_widths(config)
    _shrink_experts(config)
    _shrink_vocabulary(config)
    for field in named(config, _THRESHOLD):
        field.map_counts({v: min(v, _REACH) for v in field.counts})
    # Rotary frequencies depend on the real window; a table of learned positions need not be as long.
    if not any(rope_tables(config)):
        for field in named(config, _POSITIONS):
            field.map_counts({v: min(v, _MAX_POSITIONS) for v in field.counts})


def is_crossed(config: PreTrainedConfig, tokens: int) -> bool:
    """Whether a sequence of so many tokens goes beyond every window and other threshold of `config`."""
    return all(count < tokens for field in named(config, _THRESHOLD) for count in field.counts)


# --- widths -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Heads:
    """The attention's base sizes: everything that is as wide as a head, or as the model, scales with them."""

    count: int
    dim: int
    hidden: int
    ratio: Fraction  # of the hidden size to count x dim


def _shrink_widths(config: PreTrainedConfig) -> None:
    old = _measure(config)
    counts = _chain({v for field in named(config, _HEADS) for v in field.counts})
    rotary = _Rotary.of(config, old.dim)
    dim = next(d for d in (16, 32, 64, old.dim) if d >= old.dim or rotary.fits(d, old.dim))
    dim = min(dim, old.dim)
    count = counts.get(old.count, old.count)
    # Distinct where they were: a hidden size that is not heads x head_dim stays smaller, or stays larger.
    factor = Fraction(1) if old.ratio == 1 else Fraction(3, 4) if old.ratio < 1 else Fraction(3, 2)
    hidden = min(old.hidden, int(count * dim * factor))

    for field in named(config, _HEADS):
        field.map_counts(counts)
    for field in named(config, _HEAD_DIM):
        field.map_counts({v: _scaled(v, dim, old.dim) for v in field.counts})
    for field in fields(config):
        if isinstance(field.value, list | tuple) and sum(field.counts) == old.hidden:
            field.set(type(field.value)(_partition(field.counts, hidden)))
    for field in named(config, _WIDTH):
        field.map_counts({v: _width(v, hidden, old.hidden) for v in field.counts})
    rotary.resize(config, dim, old.dim)


def _measure(config: PreTrainedConfig) -> _Heads:
    count, hidden = (entry(config, name) for name in ("num_attention_heads", "hidden_size"))
    if not isinstance(count, int) or not isinstance(hidden, int):
        raise CaptureError(
            f"{type(config).__name__} does not say num_attention_heads and hidden_size",
            hint="a decoder's config has both, or an attribute_map that leads to them",
        )
    # With latent attention `head_dim` is only the rotary part; the values are as wide as a head.
    dims = (entry(config, name) for name in ("v_head_dim", "head_dim", "d_head", "dim_head", "attention_head_size"))
    dim = next((d for d in dims if type(d) is int and d > 0), None)
    return _Heads(count, dim or hidden // count, hidden, Fraction(hidden, count * dim) if dim else Fraction(1))


def _chain(counts: set[int]) -> dict[int, int]:
    """Head counts as powers of two, smallest first: each divides the next, and ratios above 1 stay above 1."""
    several = sorted(v for v in counts if v > 1)
    first = 2 if len(several) > 1 else 4
    return {v: min(v, first << i) for i, v in enumerate(several)}


def _scaled(value: int, new: int, old: int) -> int:
    """`value` in the proportion `new / old`, even (rotary embeddings work on pairs)."""
    return value if new == old else max(2, 2 * round(value * new / old / 2))


def _width(value: int, hidden: int, old_hidden: int) -> int:
    """A layer's width in proportion to the hidden size: a multiple of it exactly, else in eights, from 1/8 to 4."""
    ratio = min(max(Fraction(value, old_hidden), Fraction(1, 8)), Fraction(4))
    return min(value, int(hidden * ratio) if ratio.denominator == 1 else 8 * ceil(hidden * ratio / 8))


# --- rotary embeddings ------------------------------------------------------------------------------------------------

_PARTIAL = ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction")
_PER_FREQUENCY = ("short_factor", "long_factor")
_SECTIONS = ("mrope_section", "xdrope_section")


@dataclass(frozen=True, slots=True)
class _Rotary:
    """What a config says about rotated dimensions, which must stay even and keep their sections."""

    head_dim: int
    dims: tuple[int, ...]
    factors: tuple[float, ...]
    sections: int

    @classmethod
    def of(cls, config: PreTrainedConfig, dim: int) -> _Rotary:
        tables: list[dict[str, Any]] = [*rope_tables(config), vars(config)]
        head_dim = entry(config, "head_dim") or dim
        factors = {table[name] for table in tables for name in _PARTIAL if isinstance(table.get(name), float)}
        sections = (len(table[name]) for table in tables for name in _SECTIONS if table.get(name))
        dims = {v for field in named(config, re.compile("qk_rope_head_dim|rotary_dim")) for v in field.counts}
        return cls(head_dim, tuple(sorted(dims)), tuple(sorted(factors)), max(sections, default=1))

    def fits(self, dim: int, old_dim: int) -> bool:
        """Whether heads of `dim` leave every rotary embedding an even size, of two frequencies or more."""
        rotated = [_scaled(v, dim, old_dim) for v in self.dims]
        rotated += [int(_scaled(self.head_dim, dim, old_dim) * f) for f in self.factors]
        return all(v % 2 == 0 and v >= max(4, 2 * self.sections) for v in rotated)

    def resize(self, config: PreTrainedConfig, dim: int, old_dim: int) -> None:
        """Resamples what is listed per frequency or per section of the rotary embedding."""
        for table in rope_tables(config):
            for name in _PER_FREQUENCY:
                if isinstance(table.get(name), list):
                    table[name] = _resample(table[name], _scaled(2 * len(table[name]), dim, old_dim) // 2)
            for name in _SECTIONS:
                if table.get(name):
                    table[name] = _partition(table[name], _scaled(2 * sum(table[name]), dim, old_dim) // 2)


def _resample(values: list[float], size: int) -> list[float]:
    """`size` of the values, evenly spaced, the first and the last among them."""
    return [values[i * (len(values) - 1) // max(1, size - 1)] for i in range(size)]


def _partition(sections: Sequence[int], total: int) -> list[int]:
    """Sections in about the old proportions that sum to `total`, none empty."""
    new = [max(1, s * total // sum(sections)) for s in sections]
    while sum(new) != total:
        more = sum(new) < total
        behind = [s * total / sum(sections) - n if more else n for s, n in zip(sections, new, strict=True)]
        new[behind.index(max(behind))] += 1 if more else -1
    return new


# --- experts, vocabulary ----------------------------------------------------------------------------------------------


def _shrink_experts(config: PreTrainedConfig) -> None:
    """At least 4 experts (2 in each of at most 4 groups), and a top-k that leaves some unchosen."""
    groups = max((v for field in named(config, _GROUPS) for v in field.counts), default=1)
    new_groups = min(groups, 4)
    for field in named(config, _TOP_GROUPS):
        field.map_counts({v: ceil(v * new_groups / groups) for v in field.counts})
    for field in named(config, _GROUPS):
        field.map_counts({v: min(v, new_groups) for v in field.counts})
    for field in named(config, _EXPERTS):
        field.map_counts({v: min(v, max(4, 2 * new_groups)) for v in field.counts})
    for field in named(config, _TOP_K):
        field.map_counts({v: min(v, 2) for v in field.counts})


def _shrink_vocabulary(config: PreTrainedConfig) -> None:
    """A small vocabulary; special tokens beyond it take its last ids, distinct where they were distinct."""
    for field in named(config, _VOCAB):
        field.map_counts({v: min(v, _VOCAB_SIZE) for v in field.counts})
    size = getattr(config, "vocab_size", _VOCAB_SIZE)
    specials = named(config, _TOKEN_ID)
    taken = {v for field in specials for v in field.counts}
    free = (i for i in range(size - 1, -1, -1) if i not in taken)
    moved = dict(zip(sorted(v for v in taken if v >= size), free, strict=False))
    for field in specials:
        field.map_counts(moved)
