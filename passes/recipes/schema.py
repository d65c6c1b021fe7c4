"""The words of a recipe: what each modifier takes, and what it assumes where nothing is said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from qcompiler.emit.groups import TargetText
from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.pipeline.safe_yaml import Place
from qcompiler.scheme import Strategy
from qcompiler.solvers.options import MAX_DAMPING

HINT = "a recipe holds `NAME_stage: {NAME_modifiers: {GPTQModifier: {...}}}`"

UNSUPPORTED = {
    "AutoRoundModifier": "rounding is not learned by gradients here: use GPTQModifier",
    "ConstantPruningModifier": "weights are not pruned here",
    "LogarithmicEqualizationModifier": "its scales are not known here: use SmoothQuantModifier or AWQModifier",
    "MagnitudePruningModifier": "weights are not pruned here",
    "QuIPModifier": "weights are not rotated here",
    "REAPPruningModifier": "experts are not pruned here",
    "SparseGPTModifier": "weights are not pruned here",
    "SpinQuantModifier": "weights are not rotated here",
    "WandaPruningModifier": "weights are not pruned here",
}
"""Modifiers of llm-compressor that change a model in ways that no pass of ours does."""

_NO_EFFECT = frozenset({"sequential_targets", "sequential_update", "pipeline", "batched_quantization"})
"""How the other tool goes about it: results are the same."""


def has_no_effect(key: str) -> bool:
    return key in _NO_EFFECT or key.startswith("offload_")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _block(value: Any) -> Any:
    """`128x128` is an old way to write [128, 128]."""
    if isinstance(value, str) and all(part.isdecimal() for part in value.split("x")):
        return [int(part) for part in value.split("x")]
    return value


def _ordering(value: Any) -> Any:
    """`weight` is static; true meant `group`, as `dynamic` did; false is no order."""
    known = {"weight": "static", "dynamic": "group", True: "group", False: None}
    value = _lower(value)
    return known.get(value, value) if isinstance(value, (str, bool)) else value


def _scheme(value: Any) -> Any:
    """Of the two forms, a mistake in one says nothing of the other."""
    targets = value.values() if isinstance(value, dict) else ()
    if isinstance(value, str | None) or (targets and all(isinstance(said, str | list | tuple) for said in targets)):
        return value
    raise ValueError("expected the name of a preset, or {preset: targets}; bits and groups belong in `config_groups`")


class _Words(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Targets = Annotated[tuple[TargetText, ...], BeforeValidator(_listed)]
Ordering = Annotated[Literal["static", "group"] | None, BeforeValidator(_ordering)]


class QuantArgs(_Words):
    """`QuantizationArgs` of compressed-tensors: how one tensor is quantized."""

    num_bits: int = 8
    type: Annotated[Literal["int", "float"], BeforeValidator(_lower)] = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: Annotated[Strategy | None, BeforeValidator(_lower)] = None
    block_structure: Annotated[tuple[int, int] | None, BeforeValidator(_block)] = None
    dynamic: Annotated[bool | Literal["local"], BeforeValidator(_lower)] = False
    actorder: Ordering = None
    scale_dtype: str | None = None
    zp_dtype: str | None = None  # codes of zero points have the type of the weight's
    observer: str | None = None
    observer_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _groups(self) -> Self:
        size, grouped = self.group_size, self.strategy in (Strategy.GROUP, Strategy.TENSOR_GROUP)
        if size is not None and (size < -1 or (size < 1 and grouped) or (size == 0 and self.strategy is None)):
            raise ValueError(
                f"group_size {size}: a group has one input or more; `group_size: -1` alone is a scale per channel"
            )
        return self


class ConfigGroup(_Words):
    """`QuantizationScheme` of compressed-tensors: what becomes of the modules that `targets` mean."""

    targets: Targets
    weights: QuantArgs | None = None
    input_activations: QuantArgs | None = None
    output_activations: QuantArgs | None = None
    format: str | None = None


class Modifier(_Words):
    """What every modifier takes. `index`, `group` and `requires_calibration_data` are written by the tool itself."""

    index: int | None = None
    group: str | None = None
    requires_calibration_data: bool | None = None
    start: float | None = None
    end: float | None = None
    update: float | None = None

    @field_validator("start", "end", "update")
    @classmethod
    def _one_shot(cls, value: float | None) -> float | None:
        if value not in (None, 0, -1):
            raise ValueError("there are no steps of training here: leave it out")
        return value


class Quantization(Modifier):
    """`QuantizationModifier`: round to nearest."""

    config_groups: dict[str, ConfigGroup] | None = None
    targets: Targets = ("Linear",)
    ignore: Annotated[tuple[TargetText, ...] | None, BeforeValidator(_listed)] = None
    scheme: Annotated[str | dict[str, Targets] | None, BeforeValidator(_scheme)] = None
    kv_cache_scheme: QuantArgs | None = None
    weight_observer: str | None = None
    input_observer: str | None = None
    output_observer: str | None = None
    observer: dict[Literal["weights", "input", "output"], str] | None = None
    bypass_divisibility_checks: bool = False

    @property
    def says_something(self) -> bool:
        """Whether there is anything to quantize; the tool takes the schemes of earlier modifiers where there is not."""
        said = (self.config_groups, self.scheme, self.kv_cache_scheme)
        return any(value is not None for value in said) or self.targets != ("Linear",) or bool(self.ignore)


class Gptq(Quantization):
    """`GPTQModifier`."""

    block_size: Annotated[int, Field(ge=1)] = 128
    dampening_frac: Annotated[float, Field(ge=0, le=MAX_DAMPING)] = 0.01
    actorder: Ordering = "static"


class AwqMapping(_Words):
    smooth_layer: TargetText
    balance_layers: Annotated[Targets, Field(min_length=1)]
    activation_hook_target: str | None = None  # where the other tool looks; the graph knows what the layers read


class Awq(Quantization):
    """`AWQModifier`: a transform; older recipes say here too how to quantize after it."""

    mappings: tuple[AwqMapping, ...] | None = None
    duo_scaling: bool | Literal["both"] = True
    n_grid: Annotated[int, Field(ge=2, le=1000)] = 20


class SmoothQuant(Modifier):
    """`SmoothQuantModifier`. A mapping is [what balances, what is smoothed]."""

    smoothing_strength: Annotated[float, Field(ge=0, le=1)] = 0.5
    mappings: tuple[tuple[Annotated[Targets, Field(min_length=1)], Targets], ...] | None = None
    ignore: Annotated[tuple[TargetText, ...] | None, BeforeValidator(_listed)] = None
    algorithm: str = "smoothquant"
    num_calibration_steps: int | None = None
    calibration_function: str | None = None


MODIFIERS: dict[str, type[Quantization | SmoothQuant]] = {
    "QuantizationModifier": Quantization,
    "GPTQModifier": Gptq,
    "AWQModifier": Awq,
    "SmoothQuantModifier": SmoothQuant,
}


@dataclass(frozen=True, slots=True)
class Written:
    """A modifier as it stands in a recipe: its name, its arguments, where."""

    name: str
    args: dict[str, Any]
    place: Place


def is_recipe(data: Any) -> bool:
    """Whether data has the keys of a recipe: stages, groups of modifiers, or modifiers."""
    keys = [key for item in (data if isinstance(data, list) else [data]) if isinstance(item, dict) for key in item]
    return any(key.endswith(("_stage", "_modifiers", "Modifier")) for key in keys)


def written_modifiers(data: Any, place: Place) -> Iterator[Written]:
    """The modifiers of a recipe, in order. Stages and groups of modifiers only name them, and may be left out.

    Raises `ConfigError` for a key that stands for none of these.
    """
    if isinstance(data, list):
        for index, item in enumerate(data):
            yield from written_modifiers(item, place.at(index))
        return
    if not isinstance(data, dict):
        raise ConfigError(f"{place}: expected modifiers by name, not {data!r}", hint=HINT)
    for key, value in data.items():
        here = place.at(key)
        if key.endswith("Modifier"):
            if not isinstance(value, dict | None):
                raise ConfigError(f"{here}: arguments of a modifier are a mapping, not {value!r}", hint=HINT)
            yield Written(key, value or {}, here)
        elif key.endswith(("_stage", "_modifiers")) or key == "modifiers":
            yield from written_modifiers(value if value is not None else {}, here)
        elif not (key == "args" and not value) and (key, value) != ("run_type", "oneshot"):
            near = did_you_mean(key, [*MODIFIERS, "run_type"])
            raise ConfigError(f"{here}: unknown key{near}", hint=HINT)
