"""A recipe as a pipeline: its modifiers become assignments by targets, and what they ask of observers options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from passes.recipes.observers import Observers, overrides
from passes.recipes.schema import (
    MODIFIERS,
    UNSUPPORTED,
    Awq,
    Gptq,
    Modifier,
    Quantization,
    SmoothQuant,
    Written,
    has_no_effect,
    is_recipe,
    written_modifiers,
)
from passes.recipes.schemes import cache_spec, group_scheme, preset_scheme
from passes.recipes.target import fitting_target
from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.pipeline.pipeline import wrong_options
from qcompiler.pipeline.safe_yaml import Place
from qcompiler.scheme import KVCacheSpec, Scheme, plain_scheme
from qcompiler.solvers.options import GptqOptions

_LEAST_DAMPING = 1e-6
"""A share of the mean that float32 still tells from none."""

_SUFFIXES = (".yaml", ".yml", ".json")


def read(data: Any, place: Place) -> dict[str, Any] | None:
    """A recipe of llm-compressor as a pipeline in plain data; None for data that is no recipe.

    Raises `ConfigError` for a modifier or an argument that is unknown, or that cannot be honoured, with the reason.
    """
    if not is_recipe(data):
        return None
    translation = _Translation(place)
    for written in written_modifiers(data, place):
        translation.add(written)
    return translation.pipeline()


@dataclass(frozen=True, slots=True)
class _Group:
    """What becomes of the modules that some targets mean. `order` is what the weights' arguments say of GPTQ's."""

    targets: tuple[str, ...]
    scheme: Scheme | None
    place: Place
    order: str | None = None
    solver: Any = None
    transform: Any = None

    def plain(self) -> dict[str, Any]:
        said = {"solver": self.solver, "transform": self.transform if self.scheme else None}
        scheme = plain_scheme(self.scheme) if self.scheme else None
        return {"targets": list(self.targets), "scheme": scheme} | {k: v for k, v in said.items() if v is not None}


@dataclass(slots=True)
class _Assignment:
    groups: list[_Group]
    ignore: tuple[str, ...]
    sites: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class _Transform:
    """A transform that waits for the modifiers that quantize after it, and the sites where it applies."""

    written: Written
    options: Any
    sites: Mapping[str, Any] | None


@dataclass(slots=True)
class _Translation:
    """What the modifiers up to here have said."""

    place: Place
    assignments: list[_Assignment] = field(default_factory=list)
    transform: _Transform | None = None
    transform_used: bool = False
    cache: KVCacheSpec | None = None
    notes: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    observers: Observers = field(init=False)

    def __post_init__(self) -> None:
        self.observers = Observers(self.differences)

    def add(self, written: Written) -> None:
        name = written.name
        if name in UNSUPPORTED:
            raise ConfigError(
                f"{written.place}: {name} has no counterpart: {UNSUPPORTED[name]}", hint="take it out of the recipe"
            )
        if name not in MODIFIERS:
            raise ConfigError(
                f"{written.place}: unknown modifier{did_you_mean(name, MODIFIERS)}",
                hint=f"modifiers: {', '.join(MODIFIERS)}",
            )
        idle = [key for key in written.args if has_no_effect(key)]
        if idle:
            self.notes.append(f"{name}: {', '.join(idle)} has no effect on the result")
        args = {key: value for key, value in written.args.items() if key not in idle}
        try:
            modifier = MODIFIERS[name].model_validate(args)
        except ValidationError as error:
            hint = "the option is known, and cannot have this value: correct it"
            if any(item["type"] == "extra_forbidden" for item in error.errors()):
                takes = MODIFIERS[name].model_fields.keys() - Modifier.model_fields.keys()
                hint = f"{name} takes {', '.join(word for word in MODIFIERS[name].model_fields if word in takes)}"
            raise ConfigError(wrong_options(error, MODIFIERS[name], written.place), hint=hint) from None
        if isinstance(modifier, SmoothQuant):
            self._smooth(modifier, written)
        elif isinstance(modifier, Awq):
            self._rescale(modifier, written)
        elif isinstance(modifier, Gptq) and not modifier.says_something:
            self._solve_what_is_there(modifier, written)
        else:
            assert isinstance(modifier, Quantization)
            self._quantize(modifier, written, self.transform)

    def _smooth(self, modifier: SmoothQuant, written: Written) -> None:
        if modifier.algorithm != "smoothquant":
            raise ConfigError(
                f"{written.place.at('algorithm')}: {modifier.algorithm} is not known here", hint="use smoothquant"
            )
        if self.assignments:
            raise ConfigError(
                f"{written.place}: it stands after modifiers that quantize, and would rescale weights that are rounded",
                hint="put it before them",
            )
        for key in ("num_calibration_steps", "calibration_function"):
            if getattr(modifier, key) is not None:
                self.notes.append(f"{written.name}: {key} has no effect: --samples says how much data is run")
        # Without mappings the tool smooths behind norms, in all the architectures that it knows.
        sites: dict[str, Any] = {"norms": True}
        if modifier.mappings is not None:
            sites = {"mappings": [_mapping(balance, smooth, written) for balance, smooth in modifier.mappings]}
        if modifier.ignore:
            sites["ignore"] = list(modifier.ignore)
        self._await(_Transform(written, {"smoothquant": {"strength": modifier.smoothing_strength}}, sites))

    def _rescale(self, modifier: Awq, written: Written) -> None:
        options = {"awq": {"grid": modifier.n_grid, "duo_scaling": modifier.duo_scaling}}
        sites = None
        if modifier.mappings is not None:
            sites = {"mappings": [_mapping(m.balance_layers, (m.smooth_layer,), written) for m in modifier.mappings]}
        transform = _Transform(written, options, sites)
        if not modifier.says_something:
            self._await(transform)
        elif self.transform is not None:
            raise _two_transforms(self.transform.written, written)
        else:
            self._quantize(modifier, written, transform)

    def _await(self, transform: _Transform) -> None:
        if self.transform is not None:
            raise _two_transforms(self.transform.written, transform.written)
        self.transform = transform

    def _solve_what_is_there(self, modifier: Gptq, written: Written) -> None:
        """A GPTQModifier that says no scheme rounds what the modifiers before it gave one."""
        if not any(group.scheme for assignment in self.assignments for group in assignment.groups):
            raise ConfigError(f"{written.place}: nothing to quantize", hint="say `scheme` or `config_groups`")
        for assignment in self.assignments:
            assignment.groups = [
                replace(g, solver=self._gptq(modifier, g.order, written)) if g.scheme else g for g in assignment.groups
            ]

    def _quantize(self, modifier: Quantization, written: Written, transform: _Transform | None) -> None:
        place = written.place
        groups = list(self._groups(modifier, written))
        if not groups and modifier.kv_cache_scheme is None:
            raise ConfigError(f"{place}: nothing to quantize", hint="say `scheme` or `config_groups`")
        if isinstance(modifier, Gptq):
            groups = [replace(g, solver=self._gptq(modifier, self._order(modifier, g), written)) for g in groups]
        if transform is not None:
            groups = [replace(group, transform=transform.options) for group in groups]
            self.transform_used |= transform is self.transform and any(group.scheme for group in groups)
        if groups:
            sites = transform.sites if transform else None
            self.assignments.append(_Assignment(groups, modifier.ignore or (), sites))
        if modifier.kv_cache_scheme is not None:
            self._cache(modifier, place)
        if modifier.bypass_divisibility_checks:
            self.notes.append(
                f"{written.name}: bypass_divisibility_checks has no effect: groups that do not divide a layer's inputs "
                "have no form in a checkpoint, and are refused"
            )

    def _groups(self, modifier: Quantization, written: Written) -> list[_Group]:
        place = written.place
        said_of_all = overrides(modifier, place)
        if modifier.scheme is not None and modifier.config_groups is not None:
            raise ConfigError(f"{place}: it says both `scheme` and `config_groups`", hint="say one of them")
        if modifier.scheme is not None:
            here = place.at("scheme")
            named = modifier.scheme if isinstance(modifier.scheme, dict) else {modifier.scheme: modifier.targets}
            groups = [_Group(targets, preset_scheme(name, here), here) for name, targets in named.items()]
            for group in groups:
                self._observe(group, {"input": "static_minmax", **said_of_all}, {})
        else:
            groups = []
            for name, said in (modifier.config_groups or {}).items():
                here = place.at("config_groups", name)
                order = said.weights.actorder if said.weights else None
                group = _Group(said.targets, group_scheme(said, here), here, order)
                own = {"weights": said.weights, "input": said.input_activations}
                observers = {key: args.observer for key, args in own.items() if args and args.observer}
                self._observe(group, {**observers, **said_of_all}, said.weights.observer_kwargs if said.weights else {})
                groups.append(group)
                if order is not None and not isinstance(modifier, Gptq):
                    self.notes.append(f"{written.name}: actorder of {name} has no effect without a GPTQModifier")
        if (isinstance(modifier.scheme, dict) or modifier.config_groups) and modifier.targets != ("Linear",):
            self.notes.append(f"{written.name}: targets has no effect: its groups have their own")
        return groups

    def _observe(self, group: _Group, names: Mapping[str, str], kwargs: Mapping[str, Any]) -> None:
        if group.scheme is None:
            return
        self.observers.weights(names.get("weights"), kwargs, group.place)
        inputs = group.scheme.input_activations
        if inputs is not None and inputs.dynamic is not True:
            self.observers.inputs(names.get("input"), group.place)

    def _cache(self, modifier: Quantization, place: Place) -> None:
        args = modifier.kv_cache_scheme
        assert args is not None
        here = place.at("kv_cache_scheme")
        spec = cache_spec(args, here)
        if self.cache not in (None, spec):
            raise ConfigError(f"{here}: it is said before, and otherwise", hint="say it once")
        self.cache = spec
        self.observers.cache(args.observer, here)

    def _order(self, modifier: Gptq, group: _Group) -> str | None:
        """The modifier's order of columns goes for groups that say none; to say two is an error."""
        if "actorder" not in modifier.model_fields_set:
            return group.order or modifier.actorder
        if group.order not in (None, modifier.actorder):
            raise ConfigError(
                f"{group.place}: actorder {group.order} of the weights, and {modifier.actorder} of the modifier",
                hint="say it once",
            )
        return modifier.actorder

    def _gptq(self, modifier: Gptq, order: str | None, written: Written) -> Any:
        if order == "group":
            self._differs(
                f"{written.name}: actorder group needs an index of groups (g_idx) in the checkpoint, which no format "
                "here has, and which compressed-tensors has given up: columns are solved in that order, and groups "
                "stay where they are (static)"
            )
        if modifier.dampening_frac == 0:
            self._differs(
                f"{written.name}: dampening_frac 0 becomes {_LEAST_DAMPING:g}, and more where a Hessian needs it; "
                "llm-compressor adds nothing, and rounds to nearest where the Hessian is not positive definite"
            )
        options = GptqOptions(
            damping=modifier.dampening_frac or _LEAST_DAMPING,
            order="natural" if order is None else "activation",
            block_size=modifier.block_size,
        )
        said = options.model_dump(exclude_defaults=True)
        return {"gptq": said} if said else "gptq"

    def _differs(self, text: str) -> None:
        if text not in self.differences:
            self.differences.append(text)

    def pipeline(self) -> dict[str, Any]:
        schemes = [g.scheme for assignment in self.assignments for g in assignment.groups if g.scheme is not None]
        if not schemes and self.cache is None:
            raise ConfigError(f"{self.place}: nothing in it quantizes", hint="add a QuantizationModifier")
        if self.transform is not None and not self.transform_used:
            raise ConfigError(
                f"{self.transform.written.place}: nothing after it quantizes",
                hint="add a QuantizationModifier or a GPTQModifier behind it",
            )
        target = fitting_target(schemes, self.cache)
        if target == "transformers":
            self.notes.append("vLLM does not take all of these schemes: they are checked for transformers")
        options: dict[str, Any] = {**self.observers.options(), "legalize": {"target": target} if target else {}}
        rest = ("legalize", "insert-observers", "calibrate", "lower")
        where = Path(self.place.where)
        return {
            "name": where.stem if where.suffix in _SUFFIXES else "recipe",
            "description": "Translated from a recipe of llm-compressor.",
            "passes": [
                {"assign-targets": self._assign()},
                *({name: options[name]} if options.get(name) else name for name in rest),
            ],
        }

    def _assign(self) -> dict[str, Any]:
        assignments = [
            {"groups": [group.plain() for group in assignment.groups]}
            | ({"ignore": list(assignment.ignore)} if assignment.ignore else {})
            | ({"transform_sites": assignment.sites} if assignment.sites else {})
            for assignment in self.assignments
        ]
        said = {
            "assignments": assignments,
            "kv_cache": self.cache.model_dump() if self.cache else None,
            "notes": self.notes,
            "differences": self.differences,
        }
        return {key: value for key, value in said.items() if value}


def _mapping(consumers: Sequence[str], producer: Sequence[str], written: Written) -> dict[str, Any]:
    if len(producer) != 1:
        raise ConfigError(
            f"{written.place.at('mappings')}: one layer is smoothed, not {', '.join(producer) or 'none'}",
            hint="write one mapping for each",
        )
    return {"producer": producer[0], "consumers": list(consumers)}


def _two_transforms(first: Written, second: Written) -> ConfigError:
    return ConfigError(
        f"{second.place}: a layer's inputs are rescaled once, and {first.name} does it", hint="take one of them out"
    )
