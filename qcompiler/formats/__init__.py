"""On-disk layouts of compressed-tensors: predicted, packed and unpacked."""

from qcompiler.formats.layout import cache_scale, layout
from qcompiler.formats.pack import InputParams, pack, unpack

__all__ = ["InputParams", "cache_scale", "layout", "pack", "unpack"]
