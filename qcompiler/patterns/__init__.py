"""Declarative patterns over a captured graph: say what is looked for, get matches and explained near misses."""

from qcompiler.patterns.language import Check, Match, NearMiss, Pattern, Walk, leaf, op

__all__ = ["Check", "Match", "NearMiss", "Pattern", "Walk", "leaf", "op"]
