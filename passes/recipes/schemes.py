"""Schemes of a recipe in our words."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from passes.recipes.schema import ConfigGroup, QuantArgs
from qcompiler.emit.schema import read_args, read_kv_cache
from qcompiler.errors import ConfigError
from qcompiler.pipeline.safe_yaml import Place
from qcompiler.scheme import PRESETS, KVCacheSpec, QuantSpec, Scheme, preset

_PRESETS = f"presets that are right: {', '.join(PRESETS)}"
UNQUANTIZED = "UNQUANTIZED"
"""A preset that means: leave it as it is."""


def preset_scheme(name: str, place: Place) -> Scheme | None:
    """The scheme of a preset. Raises `ConfigError` with near names where there is none."""
    if name.upper() == UNQUANTIZED:
        return None
    try:
        return preset(name)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error.message}", hint=error.hint) from None


def group_scheme(group: ConfigGroup, place: Place) -> Scheme | None:
    """The scheme of a config group; None where it quantizes nothing. Raises `ConfigError` for what has no form here."""
    if group.output_activations is not None:
        raise ConfigError(
            f"{place.at('output_activations')}: outputs are not quantized here",
            hint="quantize the inputs of the layers that read them; for keys and values, say kv_cache_scheme",
        )
    if group.weights is None:
        if group.input_activations is not None:
            raise ConfigError(
                f"{place}: activations of modules whose weights stay as they are are not quantized here",
                hint="say `weights`; for attention, say kv_cache_scheme",
            )
        return None
    weights = _spec(group.weights, place.at("weights"))
    inputs = _spec(group.input_activations, place.at("input_activations")) if group.input_activations else None
    try:
        scheme = Scheme.model_validate({"weights": weights, "input_activations": inputs})
    except ValidationError as error:
        raise ConfigError(f"{place}: {_words(error)}", hint=_PRESETS) from None
    if group.format not in (None, "dense", scheme.format):
        raise ConfigError(
            f"{place.at('format')}: {scheme.short} is written as {scheme.format}, not {group.format}",
            hint="leave the format out",
        )
    return scheme


def cache_spec(args: QuantArgs, place: Place) -> KVCacheSpec:
    """How keys and values are quantized. Raises `ConfigError` for anything but static symmetric FP8."""
    return read_kv_cache(_plain(args), str(place))


def _spec(args: QuantArgs, place: Place) -> QuantSpec:
    try:
        return read_args(_plain(args), str(place))
    except ConfigError as error:
        raise ConfigError(error.message, hint=error.hint or _PRESETS) from None


def _plain(args: QuantArgs) -> dict[str, Any]:
    return args.model_dump(exclude={"actorder"})  # of GPTQ, and not of what is written


def _words(error: ValidationError) -> str:
    return "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())
