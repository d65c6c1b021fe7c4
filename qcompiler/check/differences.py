"""How the tensors of a linear differ from the layout of its group: what is told of each difference, and to whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompiler.check.config import Group
from qcompiler.check.findings import ALL, Finding
from qcompiler.check.linears import Linear
from qcompiler.checkpoints.header import TensorMeta
from qcompiler.scheme import Format, Strategy
from qcompiler.tensors import Spec

FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32})
INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64})
"""Dtypes of zero points."""
AGAIN = "write the checkpoint again with the tool that made it"
_BUT_TRANSFORMERS = ("vllm", "sglang")
_SIZES = frozenset({torch.int64, torch.int32})


@dataclass(frozen=True, slots=True)
class Difference:
    part: str
    found: TensorMeta | None
    wanted: Spec | None


def alike(part: str, found: TensorMeta, wanted: Spec) -> bool:
    dtype, shape = wanted
    return _same_dtype(part, found.dtype, dtype) and (found.shape == shape or (shape == (1,) and found.shape == ()))


def is_scalar(meta: TensorMeta | None) -> bool:
    """PyTorch promotes no dtype for a tensor of no dimension."""
    return meta is not None and meta.shape == ()


def _same_dtype(part: str, found: torch.dtype, wanted: torch.dtype) -> bool:
    """Loaders copy scales and zero points into their own dtype, so any float of 16 bits or more does, and any integer
    that is wide enough: the values are looked at by themselves.
    """
    if part == "weight_shape":
        return found in _SIZES
    if part == "input_zero_point":
        return found in INTEGERS
    scales = FLOATS | {torch.float8_e4m3fn} if part == "weight_scale" else FLOATS
    return found == wanted or (wanted in scales and found in FLOATS)


def of_format(name: str, group: Group, other: Format) -> Finding:
    """Tensors of another format than the config says. Who looks for those of the written one?"""
    loaders = [*ALL]
    if group.format is Format.NVFP4 and other is not Format.PACK_QUANTIZED:
        loaders = ["transformers"]  # the others only read from it that activations are quantized
    if not group.own and other is group.scheme.format:
        loaders = [loader for loader in loaders if loader != "transformers"]
    message = f"the config says {group.format}, its tensors are {other}"
    mend = f'write "format": "{other}" into its group'
    if not loaders:
        return Finding.of("format-untidy", name, (), f"{message}: loaders go by its numbers", mend)
    message += ": other tensors are looked for, and loading raises or leaves weights at random"
    return Finding.of("format-disagrees", name, loaders, message, mend)


def told(linear: Linear, group: Group, difference: Difference, sizes: tuple[int, int], *, shifted: bool) -> Finding:
    """One difference, with its cause where it is known. sizes: outputs and inputs of the weight. shifted: whether zero
    points that a symmetric group does not have mean something.
    """
    name, (rows, columns) = linear.name, sizes
    part, found, wanted = difference.part, difference.found, difference.wanted
    scheme = group.scheme
    if found is None:
        assert wanted is not None
        missed = ("transformers",) if part == "weight_shape" else ALL
        message = f"{part} {spec(*wanted)} is missing: {scheme.short} in {group.format} has it"
        return Finding.of("tensor-missing", name, missed, message, AGAIN)
    if wanted is None:
        return _unexpected(name, group, part, found, shifted=shifted)
    message = f"{part} is {spec(found.dtype, found.shape)}, loaders expect {spec(*wanted)}"
    if not _same_dtype(part, found.dtype, wanted[0]):
        # vLLM casts as it copies, which loses nothing where the integers are wider. Transformers casts floats alone.
        wider = {found.dtype, wanted[0]} == {torch.int64, torch.int32}
        inputs = scheme.input_activations
        kept = part == "weight" and found.dtype is torch.int8 and (inputs is None or inputs.type == "int")
        loaders = ("transformers",) if wider else _BUT_TRANSFORMERS if kept else ALL
        return Finding.of("tensor-dtype", name, loaders, message, _retyped(group, difference) or AGAIN)
    if part == "weight_scale" and scheme.weights.strategy is Strategy.CHANNEL and found.shape == wanted[1][:1]:
        return Finding.of("scale-one-dimensional", name, ALL, f"{message}: they raise", "reshape it to [O, 1]")
    if part == "weight_packed" and group.format is Format.PACK_QUANTIZED:
        per_word = 32 // scheme.weights.bits
        if 32 % scheme.weights.bits and found.shape == (wanted[1][0], -(-columns // per_word)):
            why = f"{message}: {per_word} values to a word, as before compressed-tensors 0.18"
            return Finding.of("words-padded", name, ALL, why, "write it again with compressed-tensors 0.18 or later")
    if found.shape != wanted[1] and found.shape == wanted[1][::-1]:
        return Finding.of("tensor-shape", name, ALL, f"{message}: it is the transpose", "transpose it")
    merged = linear.path.kind == "experts"  # in Transformers, whose converter is another reader
    if part == "weight_scale" and not merged and (strategy := _broadcast(group, found.shape, rows)) is not None:
        mend = f'write "strategy": "{strategy}" into its group, without group_size'
        return Finding.of("tensor-shape", name, _BUT_TRANSFORMERS, f"{message}: vLLM raises", mend)
    return Finding.of("tensor-shape", name, ALL, message, _resized(group, difference, columns) or AGAIN)


def _broadcast(group: Group, shape: tuple[int, ...], rows: int) -> Strategy | None:
    """The strategy of scales that Transformers multiplies by whatever the config says: it broadcasts them."""
    weights = group.scheme.weights
    if not weights.symmetric or weights.is_mx:
        return None
    if weights.strategy in (Strategy.TENSOR, Strategy.GROUP) and shape == (rows, 1):
        return Strategy.CHANNEL
    return Strategy.TENSOR if weights.strategy is Strategy.CHANNEL and shape in ((1,), ()) else None


def _retyped(group: Group, difference: Difference) -> str | None:
    """The type that the config would have to say for 8-bit codes to have the dtype that was found."""
    found = None if difference.found is None else difference.found.dtype
    type_ = {torch.int8: "int", torch.float8_e4m3fn: "float"}.get(found) if found is not None else None
    if difference.part != "weight" or type_ is None:
        return None
    return f'write "type": "{type_}" into the weights of its group, and into its activations if they are that too'


def _resized(group: Group, difference: Difference, columns: int) -> str | None:
    """What the config would have to say for a tensor of integer weights to have the shape that was found."""
    part, found, wanted, weights = difference.part, difference.found, difference.wanted, group.scheme.weights
    if found is None or wanted is None or weights.type != "int" or len(found.shape) != 2:
        return None
    rows, groups = found.shape
    if rows != wanted[1][0] or not groups or columns % groups:
        return None
    size = columns // groups
    if part == "weight_scale" and weights.strategy is Strategy.GROUP and 1 < size < columns:
        return f'write "group_size": {size} into its group, if that is what it was quantized with'
    if part == "weight_packed" and 1 < size <= 16 and 32 % size == 0:
        return f'write "num_bits": {32 // size} into its group, if that is what it was quantized with'
    return None


def _unexpected(name: str, group: Group, part: str, found: TensorMeta, *, shifted: bool) -> Finding:
    what = f"{part} {spec(found.dtype, found.shape)}"
    loaders = ("vllm", "sglang")
    if part == "weight_zero_point":
        message = f"{what}, and {group.scheme.short} is symmetric: vLLM has no parameter for it and raises"
        mend = "write symmetric: false" if shifted else "remove it, or write symmetric: false"
        return Finding.of("zero-point-unexpected", name, loaders, message, mend)
    if part == "weight_g_idx":
        message = f"{what}: loaders no longer read an order of activations: vLLM raises, Transformers permutes nothing"
        return Finding.of("order-tensor", name, ALL, message, 'quantize again with actorder "static" or null')
    message = f"{what} belongs to no {group.scheme.short} in {group.format}: vLLM has no parameter for it and raises"
    return Finding.of("tensor-unexpected", name, loaders, message, "remove it, or correct the group")


def spec(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype_name(dtype)} {list(shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
