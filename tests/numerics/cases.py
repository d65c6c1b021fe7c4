"""Weight specs for parametrized tests: one of every kind that a scheme can ask for."""

from __future__ import annotations

from typing import Literal

from qcompiler.scheme import QuantSpec, Strategy, preset


def integer(bits: int, strategy: Strategy, *, symmetric: bool = True) -> QuantSpec:
    return _spec("int", bits, strategy, symmetric)


def _spec(kind: Literal["int", "float"], bits: int, strategy: Strategy, symmetric: bool = True) -> QuantSpec:
    return QuantSpec(
        type=kind,
        bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=32 if strategy is Strategy.GROUP else None,
        block_structure=(16, 24) if strategy is Strategy.BLOCK else None,
    )


STRATEGIES = (Strategy.TENSOR, Strategy.CHANNEL, Strategy.GROUP, Strategy.BLOCK)
WEIGHT_SPECS = {
    spec.short: spec
    for spec in (
        *(integer(b, s, symmetric=sym) for b in (2, 3, 4, 5, 8) for s in STRATEGIES for sym in (True, False)),
        *(_spec("float", 8, s) for s in STRATEGIES),
        preset("NVFP4").weights,
        preset("MXFP4").weights,
        preset("MXFP8").weights,
    )
}
