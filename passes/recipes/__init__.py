"""Recipes of llm-compressor, read as pipelines of ours.

Source of what their words mean and what is assumed where they say nothing: llm-compressor 0.14.0.1 and
compressed-tensors 0.19.
"""

from passes.recipes.translate import read

__all__ = ["read"]
