"""The tensors of each linear, by their headers, against the layout of what the config says they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qcompiler.check.checkpoint import Checkpoint
from qcompiler.check.config import Config, Group, of_other_type
from qcompiler.check.differences import AGAIN, FLOATS, Difference, alike, dtype_name, is_scalar, of_format, spec, told
from qcompiler.check.findings import ALL, MODEL, Finding
from qcompiler.check.linears import Linear, Linears, stored_shape
from qcompiler.check.loaders import Meaning
from qcompiler.check.values import Values
from qcompiler.checkpoints.header import TensorMeta
from qcompiler.checkpoints.quantized import is_dense
from qcompiler.emit.sites import EXPERT_NAME
from qcompiler.errors import LegalityError
from qcompiler.formats import layout
from qcompiler.formats.bits import packed_words
from qcompiler.scheme import Format, Strategy
from qcompiler.tensors import Spec

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


class Stored:
    """The tensors of linears, and what is wrong with them."""

    def __init__(self, checkpoint: Checkpoint, config: Config, linears: Linears, values: Values) -> None:
        self._checkpoint, self._config, self._linears, self._values = checkpoint, config, linears, values
        self._of_other_type: dict[Group, list[Finding]] = {}
        for name, group in config.groups.items():
            if group is not None:
                self._of_other_type.setdefault(group, []).extend(of_other_type(name, group))
        self._missing = frozenset(linears.missing)
        self._blocks = {match["block"] for module in checkpoint.parts if (match := EXPERT_NAME.fullmatch(module))}

    def is_quantized(self, linear: Linear) -> bool:
        """Whether a linear is stored with codes and scales."""
        return self._checkpoint.is_quantized(linear.name)

    def has_weight(self, linear: Linear) -> bool:
        """Whether codes are stored under the name of the weight: formats that do not pack keep it."""
        return "weight" in self._checkpoint.parts.get(linear.name, {})

    def fits(self, linear: Linear, meaning: Meaning) -> bool:
        """Whether a linear's tensors are those of a meaning; true of one that is not known."""
        if isinstance(meaning, str):
            return True
        if meaning is None:
            return not self._checkpoint.is_quantized(linear.name)
        wanted = self._wanted(linear, meaning, meaning.format)
        return wanted is not None and not self._differences(linear, wanted)

    def findings(self, linear: Linear, meaning: Meaning, empty: str | None = None) -> Iterator[Finding]:
        """What is wrong with a linear's tensors under what loaders take it for. empty: the name of the group without
        weights that takes it, if one does.
        """
        parts, name = self._checkpoint.parts.get(linear.name, {}), linear.name
        if self._checkpoint.is_quantized(name) and f"{linear.path.name}.weight" in self._linears.ties:
            message = (
                "the config ties its weight to another, and it is stored quantized: Transformers raises, or drops it"
            )
            mend = 'write "tie_word_embeddings": false into config.json'
            yield Finding.of("tied-quantized", name, ("transformers",), message, mend)
        if isinstance(meaning, str):
            yield from self._unjudged(linear, self._config.raw["config_groups"][meaning].get("weights") or {})
        elif meaning is None:
            yield from self._dense(linear, parts, empty)
        elif not self._checkpoint.is_quantized(name) and not self._has_codes(parts):
            merged = linear.path.kind == "experts" and linear.path.expert_block not in self._blocks
            if "weight" in parts or merged:
                does = (
                    "Transformers and vLLM look for codes and scales that are not there: they raise, or run at random"
                )
                mend = "add it to ignore, or quantize it"
                yield Finding.of(
                    "stored-dense",
                    name,
                    ALL,
                    f"the config says {meaning.scheme.short}, its weight is dense: {does}",
                    mend,
                )
            else:
                yield Finding.of("tensor-missing", name, ALL, "no file holds its weight", AGAIN)
        elif not {"weight", "weight_packed"} & parts.keys():
            yield Finding.of("tensor-missing", name, ALL, "it has scales, and no file holds its codes", AGAIN)
        else:
            wanted = self._wanted(linear, meaning, meaning.format)
            differences = [] if wanted is None else self._differences(linear, wanted)
            if not any(difference.part == "weight" for difference in differences):
                yield from self._of_other_type.get(meaning, ())
            other = self._other_format(linear, meaning) if differences else None
            if other is not None:
                yield of_format(name, meaning, other)
            elif differences and (owner := self._other_group(linear, meaning)) is not None:
                group, stored = owner
                message = f"the config says {meaning.scheme.short}, its tensors are those of {group} ({stored})"
                yield Finding.of("group-disagrees", name, ALL, message, f"move it to the targets of {group}")
            elif differences:
                sizes, shifted = self._sizes(linear), self._values.shifted(linear, meaning)
                yield from (told(linear, meaning, each, sizes, shifted=shifted) for each in differences)
            scalars = [part for part in ("weight_global_scale", "input_global_scale") if is_scalar(parts.get(part))]
            if scalars and self._linears.dtype is not torch.float32:
                dtype = dtype_name(self._linears.dtype)
                message = (
                    f"{' and '.join(scalars)} of shape []: Transformers computes with them in {dtype}, not in float32"
                )
                yield Finding.of("global-scale-scalar", name, ("transformers",), message, "reshape them to [1]")

    @staticmethod
    def _has_codes(parts: Mapping[str, TensorMeta]) -> bool:
        """Whether a weight is codes, which lack their scales."""
        return "weight" in parts and not is_dense(parts["weight"].dtype)

    def of_model(self) -> Iterator[Finding]:
        """What is wrong with tensors of no linear: missing parameters, foreign tensors, scales of the KV cache."""
        known, tensors = self._linears, self._checkpoint.reader.tensors
        weights = {f"{linear.path.name}.weight" for linear in known.linears}  # told with their linears
        for path in known.missing:
            if path not in weights:
                yield Finding.of("tensor-missing", path, ALL, "no file holds this parameter", AGAIN)
        if known.prefixed:
            first, path = known.prefixed[0]
            message = (
                f"{first} is {path} in the model, and so are {len(known.prefixed)} tensors: Transformers adds or drops "
                "the prefix, vLLM looks for the model's own names and raises"
            )
            yield Finding.of(
                "prefix-differs", MODEL, ("vllm", "sglang"), message, "rename the tensors as the model has them"
            )
        usual = {_INDEX.sub("*", key) for key in known.dense}
        for key in known.unknown:
            expert = EXPERT_NAME.fullmatch(key.removesuffix(".weight"))
            if expert or (_INDEX.search(key) and _INDEX.sub("*", key) in usual):
                what = "experts" if expert else "layers"
                message = f"config.json counts fewer {what}: vLLM raises, Transformers drops this one or raises"
                yield Finding.of("layer-unknown", key, ALL, message, f"correct the number of {what} in config.json")
                continue
            message = "the model has no place for it: Transformers ignores it, vLLM may raise"
            yield Finding.of("tensor-unknown", key, ("vllm",), message, "remove the tensor, or correct config.json")
        on_disk = {linear.name for linear in known.linears}
        for key, (dtype, shape) in known.dense.items():
            meta, module = tensors.get(key), key.removesuffix(".weight")
            if meta is None or (module != key and self._checkpoint.is_quantized(module)):
                continue
            if meta.shape != shape:
                message = f"it has shape {list(meta.shape)}, and the model {list(shape)}"
                yield Finding.of("tensor-shape", key, ALL, message, "config.json and weights are of different models")
            if dtype.is_floating_point and not is_dense(meta.dtype) and module not in on_disk:
                message = f"it is {dtype_name(meta.dtype)} without scales: codes are read as numbers"
                yield Finding.of("tensor-dtype", key, ALL, message, AGAIN)
        if self._config.kv_cache is not None:
            yield from self._cache()

    def _cache(self) -> Iterator[Finding]:
        keys, tensors = self._linears.cache_scales, self._checkpoint.reader.tensors
        if self._linears.guessed is not None:
            keys = keys or (MODEL,)
        for key in keys:
            if key not in tensors:
                message = (
                    "kv_cache_scheme is set, and this scale is missing: vLLM takes 1.0, Transformers raises or ignores"
                )
                mend = "calibrate the KV cache, or set kv_cache_scheme to null"
                yield Finding.of("cache-scale-missing", key, ("vllm", "transformers", "sglang"), message, mend)
                continue
            meta, strategy = tensors[key], self._config.kv_cache and self._config.kv_cache.strategy
            shapes = {each for each in ("tensor", "attn_head") if self._is_cache_shape(meta.shape, each)}
            if meta.dtype not in FLOATS or strategy not in shapes:
                loaders = ("vllm", "sglang") if shapes and meta.dtype in FLOATS else ALL  # Transformers broadcasts both
                wanted = "[heads, 1, 1]" if strategy == "attn_head" else "[1]"
                message = (
                    f"it is {spec(meta.dtype, meta.shape)}; with strategy {strategy} loaders expect floats {wanted}"
                )
                yield Finding.of("cache-scale-form", key, loaders, message, "calibrate the KV cache again")

    def _is_cache_shape(self, shape: tuple[int, ...], strategy: str) -> bool:
        if strategy == "attn_head":
            heads = self._checkpoint.config.get("num_key_value_heads")
            return shape[1:] == (1, 1) and (not isinstance(heads, int) or shape[0] == heads)
        return shape in ((), (1,))

    def _dense(self, linear: Linear, parts: Mapping[str, TensorMeta], empty: str | None) -> Iterator[Finding]:
        name = linear.name
        if f"{linear.path.name}.weight" in self._missing:
            yield Finding.of("tensor-missing", name, ALL, "no file holds its weight", AGAIN)
        if self._checkpoint.is_quantized(name):
            why = "no target takes it: loaders build a dense linear, and find no weight"
            mend = "add it to a target, or take it out of ignore"
            if empty is not None:
                why = f"group {empty} takes it and has no weights: loaders raise, or build a dense linear"
                mend = f"give group {empty} its weights"
            yield Finding.of("stored-quantized", name, ALL, f"it is stored quantized, and {why}", mend)
        elif "weight" in parts and not is_dense(parts["weight"].dtype):
            message = f"its weight is {dtype_name(parts['weight'].dtype)} without scales: codes are read as weights"
            yield Finding.of("tensor-dtype", name, ALL, message, AGAIN)

    def _wanted(self, linear: Linear, group: Group, format: Format) -> dict[str, Spec] | None:
        """The layout; None where sizes are not known or groups do not divide, which legality tells."""
        out, inner = self._sizes(linear)
        if not 0 < out < 2**31 or not 0 < inner < 2**31:
            return None
        try:
            return layout(group.scheme, out, inner, self._linears.dtype, format=format)
        except LegalityError:
            return None

    def _sizes(self, linear: Linear) -> tuple[int, int]:
        """Outputs and inputs, as the model has them or else as the tensors say; zeros where neither does."""
        if linear.path.out_features and linear.path.in_features:
            return linear.path.out_features, linear.path.in_features
        return stored_shape(self._checkpoint, linear.name) or (0, 0)

    def _differences(self, linear: Linear, wanted: Mapping[str, Spec]) -> list[Difference]:
        parts = self._checkpoint.parts.get(linear.name, {})
        names = sorted(wanted.keys() | parts.keys())
        all_ = (Difference(part, parts.get(part), wanted.get(part)) for part in names)
        return [d for d in all_ if d.found is None or d.wanted is None or not alike(d.part, d.found, d.wanted)]

    def _other_group(self, linear: Linear, group: Group) -> tuple[str, str] | None:
        """The name of another group whose tensors a linear has, and its scheme in a word."""
        others = ((name, other) for name, other in self._config.groups.items() if other not in (group, None))
        return next(((name, other.scheme.short) for name, other in others if other and self.fits(linear, other)), None)

    def _unjudged(self, linear: Linear, weights: Mapping[str, Any]) -> Iterator[Finding]:
        """Where tensors deny what a group says for which there is no scheme: Transformers raises or reads wrong."""
        parts, columns = self._checkpoint.parts.get(linear.name, {}), self._sizes(linear)[1]
        scale, packed = parts.get("weight_scale"), parts.get("weight_packed")
        size, strategy = weights.get("group_size") or 0, weights.get("strategy")
        grouped = strategy in (Strategy.GROUP, Strategy.TENSOR_GROUP) and size > 0
        groups = -(-columns // size) if grouped else 1
        if scale and columns and (grouped or strategy == Strategy.CHANNEL) and scale.shape[1:] not in ((groups,), ()):
            message = f"weight_scale is {spec(scale.dtype, scale.shape)}, and the config says {groups} groups of inputs"
            found = scale.shape[1]
            mend = f'write "group_size": {columns // found} into its group' if found and columns % found == 0 else AGAIN
            yield Finding.of("tensor-shape", linear.name, ("transformers",), message, mend)
        words = packed_words(columns, weights["num_bits"]) if packed and weights.get("type") == "int" else 0
        if packed and words and packed.shape[1:] != (words,):
            message = f"weight_packed is {spec(packed.dtype, packed.shape)}, and the config says {words} words to a row"
            yield Finding.of("tensor-shape", linear.name, ("transformers",), message, "correct num_bits in its group")
        if scale and weights.get("symmetric") is False and "weight_zero_point" not in parts:
            message = "weight_zero_point is missing: its group says symmetric: false"
            yield Finding.of("tensor-missing", linear.name, ("transformers",), message, "write symmetric: true")
        if weights and "weight_global_scale" in parts and strategy != Strategy.TENSOR_GROUP:
            message = f"weight_global_scale, and strategy {strategy} has none: Transformers drops it"
            mend = 'write "strategy": "tensor_group", "group_size": 16 into its group'
            yield Finding.of("tensor-unexpected", linear.name, ("transformers",), message, mend)

    def _other_format(self, linear: Linear, group: Group) -> Format | None:
        formats = [group.scheme.format]
        if group.scheme.weights.type == "int":
            formats += [Format.PACK_QUANTIZED, Format.INT_QUANTIZED]
        for format in formats:
            if format is group.format:
                continue
            wanted = self._wanted(linear, group, format)
            if wanted is not None and not self._differences(linear, wanted):
                return format
        return None
