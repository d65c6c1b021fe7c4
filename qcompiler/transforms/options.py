"""Transforms and their options, as rules name them: `transform: awq`, or `transform: {awq: {grid: 40}}`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer

from qcompiler.errors import did_you_mean
from qcompiler.options import Options, named_table

NO_TRANSFORM = "none"


class AwqOptions(Options):
    """Scales searched for the least output error of the rounded weight.

    `grid` points are tried, one of them no scale at all. `duo_scaling`: a channel's scale is its mean activation over
    its mean weight, each to a power that is searched; without, of activations alone; `both` tries half of each. `clip`
    then shrinks ranges where that lowers the output error.
    """

    name: ClassVar[str] = "awq"

    grid: Annotated[int, Field(ge=2, le=1000)] = 20
    duo_scaling: bool | Literal["both"] = True
    clip: bool = False


class SmoothQuantOptions(Options):
    """`strength`: the share of a channel's range that moves from activations to weights; 1 moves all of it."""

    name: ClassVar[str] = "smoothquant"

    strength: Annotated[float, Field(ge=0, le=1)] = 0.5


TransformOptions = AwqOptions | SmoothQuantOptions
TRANSFORMS: dict[str, type[AwqOptions] | type[SmoothQuantOptions]] = {
    cls.name: cls for cls in (AwqOptions, SmoothQuantOptions)
}


def _named(value: Any) -> Any:
    if value is None or value == NO_TRANSFORM or isinstance(value, BaseModel):
        return None if value == NO_TRANSFORM else value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("a transform is a name, or a mapping of one name to its options")
    ((name, options),) = value.items()
    if name not in TRANSFORMS:
        known = (NO_TRANSFORM, *TRANSFORMS)
        raise ValueError(f"unknown transform {name!r}{did_you_mean(str(name), known)}; known: {', '.join(known)}")
    return named_table(TRANSFORMS, name, options)


def _plain(transform: TransformOptions | None) -> Any:
    if transform is None:
        return NO_TRANSFORM
    options = transform.model_dump(mode="json", exclude_defaults=True)
    return {transform.name: options} if options else transform.name


TransformField = Annotated[AwqOptions | SmoothQuantOptions | None, BeforeValidator(_named), PlainSerializer(_plain)]
"""A pydantic field that takes a transform's name, alone or with options; `none` (the default to give it) is None."""
