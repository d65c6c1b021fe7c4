"""Rounding a weight so that the layer's output changes least, given what its inputs look like."""

from qcompiler.solvers.gptq import GptqOptions, Outcome, gptq

__all__ = ["GptqOptions", "Outcome", "gptq"]
