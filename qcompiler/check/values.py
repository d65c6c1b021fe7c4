"""The values of scales and zero points, read a few MiB at a time. Weights are not read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompiler.check.checkpoint import Checkpoint
from qcompiler.check.config import Group
from qcompiler.check.differences import FLOATS, INTEGERS, dtype_name
from qcompiler.check.findings import ALL, Finding
from qcompiler.check.linears import Linear, Linears
from qcompiler.check.loaders import Meaning, Verdicts
from qcompiler.checkpoints.header import TensorMeta
from qcompiler.formats.bits import packed_words, unpack_words
from qcompiler.scheme import QuantSpec

_SCALES = ("weight_scale", "weight_global_scale", "input_global_scale", "input_scale")
_DIVISORS = (*_SCALES[1:], "cache_scale")
_LARGEST = 464  # that E4M3 rounds to its own largest number, 448
_NAN_EXPONENT = 255  # of E8M0
_PLACES = 8  # where two tensors are compared
_SAMPLE = 4096  # bytes at each
_MEND = "quantize this layer again"


@dataclass(slots=True)
class _Counts:
    total: int = 0
    infinite: int = 0
    negative: int = 0
    zero: int = 0
    small: int = 0

    def add(self, values: Tensor) -> None:
        self.total += values.numel()
        if values.dtype == torch.uint8:  # exponents of MX
            self.infinite += int((values == _NAN_EXPONENT).sum())
            return
        wide = values.float()
        self.infinite += int((~wide.isfinite()).sum())
        self.negative += int((wide < 0).sum())
        self.zero += int((wide == 0).sum())
        self.small += int(((wide < 1) & (wide > 0)).sum())


class Values:
    """Reads scales and zero points of a checkpoint. `read` counts the scales that were looked at."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.read = 0

    def findings(self, linear: Linear, meaning: Meaning) -> Iterator[Finding]:
        """What is wrong with the numbers of a quantized linear."""
        yield from self.scales(linear)
        if isinstance(meaning, Group):
            yield from self._zero_points(linear, meaning)
            yield from self._dropped(linear, meaning)
            yield from self._rounded(linear, meaning)
            yield from self._shape(linear)

    def scales(self, linear: Linear) -> Iterator[Finding]:
        """What is wrong with the scales of a linear or an embedding, whatever its scheme."""
        parts = self._checkpoint.parts.get(linear.name, {})
        weights = linear.path.out_features * linear.path.in_features
        for part in _SCALES:
            # More scales than weights are an error by their shape, and would take forever.
            if part in parts and (not weights or math.prod(parts[part].shape) <= weights):
                yield from self.scale(linear.name, part, parts[part])

    def scale(self, layer: str, part: str, meta: TensorMeta) -> Iterator[Finding]:
        """What is wrong with one scale."""
        if not meta.dtype.is_floating_point and meta.dtype != torch.uint8:
            return  # its dtype is a finding already
        counts = _Counts()
        for values in self._checkpoint.chunks(meta):
            counts.add(values)
        self.read += counts.total
        of = f"of {counts.total} values of {part}"
        if counts.infinite:
            does = "every output of the layer is NaN or wrong, in every loader"
            message = f"{counts.infinite} {of} are NaN or infinite: {does}"
            yield Finding.of("scale-not-finite", layer, ALL, message, _MEND)
        if counts.negative and (part in _DIVISORS or meta.dtype == torch.float8_e4m3fn):
            message = f"{counts.negative} {of} are negative: kernels read them as unsigned, or divide by them"
            yield Finding.of("scale-negative", layer, ALL, message, _MEND)
        elif counts.negative:
            message = f"{counts.negative} {of} are negative: loaders multiply by them, which no writer means"
            yield Finding.of("weight-scale-negative", layer, ALL, message, _MEND)
        if part == "weight_global_scale" and counts.small and not counts.negative:
            message = (
                f"{part} is below 1, which makes weights as large as 2688: it is divided by, and seems to be the "
                "reciprocal, as ModelOpt writes it"
            )
            yield Finding.of("global-scale-small", layer, ALL, message, "write its reciprocal, or see that it is meant")
        if counts.zero and part in _DIVISORS:
            yield Finding.of(
                "global-scale-zero", layer, ALL, f"{part} is zero: it is divided by, which gives NaN", _MEND
            )
        elif counts.zero:
            message = f"{counts.zero} {of} are zero: these weights are read as zeros"
            yield Finding.of("scale-zero", layer, ALL, message, "see that the dense weights were zero there")

    def tied(self, linears: Linears) -> Iterator[Finding]:
        """Tensors that the model ties and the files hold apart, compared at a few places."""
        for key, other in linears.tied:
            if self._sample(key) != self._sample(other):
                message = (
                    f"the config ties it to {key}, and its values are others: Transformers and vLLM 0.32 keep both, "
                    f"SGLang and older vLLM take {key} for both"
                )
                mend = 'write "tie_word_embeddings": false into config.json'
                yield Finding.of("tied-differ", other, ("sglang",), message, mend)

    def _sample(self, key: str) -> tuple[object, ...]:
        meta = self._checkpoint.reader.meta(key)
        last = max(0, meta.nbytes - _SAMPLE)
        places = (last * place // (_PLACES - 1) for place in range(_PLACES))
        return meta.dtype, meta.shape, *(self._checkpoint.reader.bytes_at(key, start, _SAMPLE) for start in places)

    def fused(self, verdicts: Verdicts) -> Iterator[Finding]:
        """Scales that the shards of vLLM's fused modules must share, and do not."""
        modules = {v.resolution.module.name: v for said in verdicts.values() for v in said if v.loader == "vllm"}
        for name, verdict in modules.items():
            module = verdict.resolution.module
            if module.is_expert_block or not isinstance(verdict.meaning, Group) or len(module.sites) < 2:
                continue
            shards = [site.name for site in module.sites]
            leaves, scheme = ", ".join(site.leaf for site in module.sites), verdict.meaning.scheme
            if scheme.weights.is_nvfp4:
                for part in ("weight_global_scale", "input_global_scale"):
                    if self._differ(shards, part):
                        message = f"{part} differs between {leaves}: vLLM takes the largest for all and rescales none"
                        mend = f"quantize {leaves} with one global scale"
                        yield Finding.of("global-scales-differ", name, ("vllm", "sglang"), message, mend)
            inputs = scheme.input_activations
            if inputs is not None and inputs.type == "int" and inputs.dynamic is False:
                for part in ("input_scale", "input_zero_point"):
                    if self._differ(shards, part):
                        message = f"{part} differs between {leaves}: vLLM has one slot, and the last one wins"
                        mend = f"write one {part} for {leaves}: they read the same tensor"
                        yield Finding.of("input-scales-differ", name, ("vllm", "sglang"), message, mend)

    def _differ(self, shards: Sequence[str], part: str) -> bool:
        metas = [meta for shard in shards if (meta := self._checkpoint.parts.get(shard, {}).get(part)) is not None]
        first = [next(self._checkpoint.chunks(meta))[:1].double() for meta in metas if meta.nbytes]
        return any(not torch.equal(value, first[0]) for value in first)

    def _zero_points(self, linear: Linear, group: Group) -> Iterator[Finding]:
        parts = self._checkpoint.parts.get(linear.name, {})
        inputs = group.scheme.input_activations
        specs: list[tuple[str, QuantSpec | None]] = [
            ("weight_zero_point", group.scheme.weights),
            ("input_zero_point", inputs),
        ]
        for part, spec in specs:
            meta = parts.get(part)
            packed = part == "weight_zero_point" and meta is not None and meta.dtype != torch.int8
            if meta is None or spec is None or meta.dtype not in INTEGERS or packed:
                continue  # packed ones cannot leave their range
            low, high = -(1 << (spec.bits - 1)), (1 << (spec.bits - 1)) - 1
            wrong = sum(int(((v < low) | (v > high)).sum()) for v in self._checkpoint.chunks(meta))
            if wrong:
                message = (
                    f"{wrong} values of {part} are outside {low} to {high}: loaders take other numbers, or the low bits"
                )
                yield Finding.of("zero-point-range", linear.name, ALL, message, _MEND)

    def _dropped(self, linear: Linear, group: Group) -> Iterator[Finding]:
        """Zero points that Transformers drops, because the config says symmetric, and that mean something."""
        parts, scheme = self._checkpoint.parts.get(linear.name, {}), group.scheme
        weights, inputs = parts.get("weight_zero_point"), parts.get("input_zero_point")
        does = "are not those of symmetric numbers, which the config says these are: Transformers drops them, and"
        if weights is not None and weights.dtype in INTEGERS and self.shifted(linear, group):
            message = f"zero points {does} reads other weights"
            yield Finding.of("zero-point-unexpected", linear.name, ("transformers",), message, "write symmetric: false")
        symmetric = scheme.input_activations is not None and scheme.input_activations.symmetric
        if inputs is not None and symmetric and inputs.dtype in INTEGERS and self._any(inputs):
            message = f"input_zero_point: zero points {does} rounds other activations"
            mend = "write symmetric: false into its input_activations"
            yield Finding.of("tensor-unexpected", linear.name, ("transformers",), message, mend)

    def shifted(self, linear: Linear, group: Group) -> bool:
        """Whether weights that a group calls symmetric have zero points that are not the middle of their range, or may
        not be: zero points of a shape or dtype that no loader knows are not read.
        """
        parts, spec = self._checkpoint.parts.get(linear.name, {}), group.scheme.weights
        meta = parts.get("weight_zero_point")
        if meta is None or not spec.symmetric:
            return False
        if meta.dtype not in INTEGERS:
            return True
        if meta.dtype != torch.int32 or spec.type != "int" or "weight_packed" not in parts:
            return self._any(meta)  # pack-quantized alone packs them
        rows, columns = linear.path.out_features, linear.path.in_features
        # Of another shape, they are an error whatever they mean, and may take forever.
        if len(meta.shape) != 2 or packed_words(rows, spec.bits) != meta.shape[0] or not 0 < meta.shape[1] <= columns:
            return True
        words = torch.cat([*self._checkpoint.chunks(meta)]).view(meta.shape)
        return bool(unpack_words(words.T, spec.bits, rows).any())

    def _any(self, meta: TensorMeta) -> bool:
        return any(bool(values.any()) for values in self._checkpoint.chunks(meta))

    def _rounded(self, linear: Linear, group: Group) -> Iterator[Finding]:
        """NVFP4 scales of a wider dtype, which every loader rounds to FP8."""
        meta = self._checkpoint.parts.get(linear.name, {}).get("weight_scale")
        if not group.scheme.weights.is_nvfp4 or meta is None or meta.dtype not in FLOATS:
            return
        if math.prod(meta.shape) > linear.path.out_features * linear.path.in_features:
            return  # an error by its shape
        large = sum(int((values.float() > _LARGEST).sum()) for values in self._checkpoint.chunks(meta))
        if large:
            message = f"weight_scale is {dtype_name(meta.dtype)}, and {large} values are beyond FP8's range"
            yield Finding.of("tensor-dtype", linear.name, ALL, f"{message}: loaders read it as FP8", _MEND)

    def _shape(self, linear: Linear) -> Iterator[Finding]:
        meta = self._checkpoint.parts.get(linear.name, {}).get("weight_shape")
        sizes = [linear.path.out_features, linear.path.in_features]
        if meta is None or meta.shape != (2,) or not all(sizes) or linear.path.kind == "experts":
            return
        written = torch.cat([*self._checkpoint.chunks(meta)]).tolist()
        if written != sizes:
            message = f"weight_shape says {written}, and the layer is {sizes}: Transformers unpacks another matrix"
            yield Finding.of("weight-shape-wrong", linear.name, ("transformers",), message, f"write {sizes}")
