"""On-disk layouts of compressed-tensors: predicted, packed and unpacked."""

from qcompiler.formats.layout import TensorMeta, bits_per_weight, cache_scale, layout
from qcompiler.formats.pack import InputParams, pack, unpack

__all__ = ["InputParams", "TensorMeta", "bits_per_weight", "cache_scale", "layout", "pack", "unpack"]
