"""Cutting a config to its first decoder layers, so that each kept layer is what it was."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

from qcompiler.capture.twin_fields import Field, fields, layer_overrides, named
from qcompiler.errors import CaptureError

_COUNT = re.compile(
    r"(num_)?(hidden_|decoder_|encoder_)?layers(_per_stack)?|num_(hidden|decoder|encoder)_layers|n_layers?"
)
_INDICES = re.compile(r"\w*(layers|layer_ids|layer_indices|layer_idxs|attn_idxs)")
_FIRST = re.compile(r"first_k_dense_replace|(num|n)_dense_layers|num_hash_layers|moe_layer_start_index")
_LAST_INDEX = re.compile(r"moe_layer_end_index")
_FROM_END = re.compile(r"num_kv_shared_layers")
_PERIOD = re.compile(r"_?sliding_window_pattern|\w+_(step|period|interval|every_n_layers|layer_freq)")


def counts_layers(config: PreTrainedConfig) -> bool:
    """Whether `config` says of itself how many layers it has, as the parts of a composite model do."""
    return any(field.counts for field in named(config, _COUNT))


def keep_layers(config: PreTrainedConfig, layers: int | None) -> None:
    """Cuts `config`, in place, to its first `layers` decoder layers.

    `None` keeps the shortest prefix, of two layers or more, that holds every kind of layer the config declares.
    """
    counts = [field for field in named(config, _COUNT) if field.counts]
    depth = min((field.value for field in counts), default=getattr(config, "num_hidden_layers", None))
    if not isinstance(depth, int):
        raise CaptureError(
            f"{type(config).__name__} does not say how many layers it has",
            hint="a decoder's config has num_hidden_layers, or an attribute_map that leads to it",
        )
    # Some configs count both blocks and what stands in a block (two attentions each): those keep their ratio.
    kept = min(depth, _every_kind(config, depth) if layers is None else layers)
    cut = {n: n * kept // depth for n in {depth, *(field.value for field in counts)} if n % depth == 0}

    for field in named(config, _FROM_END):
        field.set(max(0, field.value - (depth - kept)))
    for field in named(config, _LAST_INDEX):
        field.set(min(field.value, kept - 1))
    for field in list(fields(config)):
        value = field.value
        if _is_index_list(field, depth):
            field.set(type(value)(i for i in value if i < kept))
        elif _is_per_layer(value, cut):
            field.set(value[: cut[len(value)]])
    for field in counts:
        field.map_counts(cut)
    if overrides := layer_overrides(config):
        config.per_layer_config = {i: changes for i, changes in overrides.items() if i < kept}


def _every_kind(config: PreTrainedConfig, depth: int) -> int:
    """The length of the shortest prefix that shows every kind of layer; at least 2."""
    need = {2}
    for field in fields(config):
        value = field.value
        if _is_index_list(field, depth):
            chosen = set(value)
            need |= {next((i for i in range(depth) if (i in chosen) is kind), 0) + 1 for kind in (True, False)}
        elif _is_per_layer(value, {depth: depth}):
            # A number that varies by layer is a size, not a kind; whether it is zero is a kind.
            kinds = [v if isinstance(v, str) else bool(v) for v in value]
            need |= {kinds.index(kind) + 1 for kind in kinds}
    need.add(min(layer_overrides(config), default=0) + 1)
    need |= {v + 1 for field in named(config, _FIRST) for v in field.counts}
    need |= {depth - v + 1 for field in named(config, _FROM_END) for v in field.counts}
    need |= {v for field in named(config, _PERIOD) for v in field.counts}
    return max(n for n in need if n <= depth) if depth > 1 else 1


def _is_per_layer(value: Any, lengths: dict[int, int]) -> bool:
    return isinstance(value, list | tuple) and len(value) in lengths and not any(isinstance(v, list) for v in value)


def _is_index_list(field: Field, depth: int) -> bool:
    value = field.value
    return (
        isinstance(value, list | tuple)
        and any(_INDICES.fullmatch(name) for name in field.names)
        and all(type(i) is int and 0 <= i < depth for i in value)
        and len(set(value)) == len(value)
    )
