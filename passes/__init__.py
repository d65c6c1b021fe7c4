"""Quantization policy: one file, one pass."""
