"""Solvers and their options, as rules name them: `solver: gptq`, or `solver: {gptq: {damping: 0.05}}`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer

from qcompiler.errors import did_you_mean
from qcompiler.options import Options, named_table

MAX_DAMPING = 1.0


class RtnOptions(Options):
    """Round to nearest."""

    name: ClassVar[str] = "rtn"


class GptqOptions(Options):
    """`damping` is added to the Hessian's diagonal, as a share of its mean; it grows tenfold where that is too little.

    `order`: columns of large activations first (`activation`, static), or as they stand. `block_size`: how many
    columns are solved before their error is brought to the rest; it changes speed, and results by rounding alone.
    """

    name: ClassVar[str] = "gptq"

    damping: Annotated[float, Field(gt=0, le=MAX_DAMPING)] = 0.01
    order: Literal["activation", "natural"] = "activation"
    block_size: Annotated[int, Field(ge=1)] = 128


NEED_HESSIAN = frozenset({GptqOptions.name})
"""Solvers that need to know what a layer's inputs look like."""

SOLVERS: dict[str, type[RtnOptions] | type[GptqOptions]] = {cls.name: cls for cls in (RtnOptions, GptqOptions)}


def _named(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("a solver is a name, or a mapping of one name to its options")
    ((name, options),) = value.items()
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}{did_you_mean(str(name), SOLVERS)}; known: {', '.join(SOLVERS)}")
    return named_table(SOLVERS, name, options)


def _plain(solver: RtnOptions | GptqOptions) -> Any:
    options = solver.model_dump(mode="json", exclude_defaults=True)
    return {solver.name: options} if options else solver.name


SolverField = Annotated[RtnOptions | GptqOptions, BeforeValidator(_named), PlainSerializer(_plain)]
"""A pydantic field that takes a solver's name, alone or with options, and prints as one."""
