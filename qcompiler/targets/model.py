"""A target as data: the schemes, shapes and names that one runtime loads on one kind of hardware."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from qcompiler.emit.sites import FusedNames
from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.scheme import Format, KVCacheSpec, QuantSpec, Strategy

_DATA = files("qcompiler.targets") / "data"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SpecPattern(_Data):
    """The `QuantSpec`s of one tensor that a row takes. Group sizes matter only where the strategy has one."""

    type: Literal["int", "float", "any"]
    bits: tuple[int, ...]
    symmetric: tuple[bool, ...] = (True,)
    strategies: tuple[Strategy, ...]
    group_sizes: tuple[int, ...] | Literal["any", "even"] = ()
    block_structures: tuple[tuple[int, int], ...] | Literal["any"] = ()
    dynamic: tuple[bool | Literal["local"], ...] = (False,)
    mx: bool = False  # power-of-two scales

    def misses(self, spec: QuantSpec) -> list[tuple[str, str]]:
        """Why `spec` does not fit, as (what is wrong, what to change). Empty: it fits."""
        if self.type not in ("any", spec.type) or self.mx != spec.is_mx or self._is_nvfp4 != spec.is_nvfp4:
            return [("another number format", "")] * 4  # no near miss: everything else is beside the point
        misses = []
        if spec.bits not in self.bits:
            misses.append((f"{spec.bits} bits (it takes {_either(self.bits)})", f"use {_either(self.bits)} bits"))
        if spec.symmetric not in self.symmetric:
            kind = "symmetric" if self.symmetric == (True,) else "asymmetric"
            misses.append((f"zero points (it takes {kind} ones)", f"make it {kind}"))
        if spec.strategy not in self.strategies:
            strategies = _either(self.strategies)
            misses.append((f"strategy {spec.strategy} (it takes {strategies})", f"use strategy {strategies}"))
        elif spec.group_size is not None and not self._takes_group(spec.group_size):
            sizes = "an even number" if isinstance(self.group_sizes, str) else _either(self.group_sizes)
            misses.append((f"groups of {spec.group_size} (it takes {sizes})", f"use group_size {sizes}"))
        elif spec.block_structure is not None and not self._takes_block(spec.block_structure):
            blocks = _either("x".join(map(str, b)) for b in self.block_structures)
            block = "x".join(map(str, spec.block_structure))
            misses.append((f"blocks of {block} (it takes {blocks})", f"use blocks of {blocks}"))
        if spec.dynamic not in self.dynamic:
            dynamic = _either(str(d).lower() for d in self.dynamic)
            misses.append((f"dynamic: {str(spec.dynamic).lower()} (it takes {dynamic})", f"set dynamic to {dynamic}"))
        return misses

    @property
    def _is_nvfp4(self) -> bool:
        return Strategy.TENSOR_GROUP in self.strategies

    def _takes_group(self, size: int) -> bool:
        if isinstance(self.group_sizes, str):
            return self.group_sizes == "any" or size % 2 == 0
        return size in self.group_sizes

    def _takes_block(self, block: tuple[int, int]) -> bool:
        return self.block_structures == "any" or block in self.block_structures


class Restriction(_Data):
    """What a row narrows to for one structure."""

    strategies: tuple[Strategy, ...] | None = None  # of the weights
    in_multiple: int | None = None
    out_multiple: int | None = None


class Row(_Data):
    """One kernel family: what it takes. `refused` rows name what a runtime visibly cannot do, with the reason."""

    weights: SpecPattern
    activations: SpecPattern | None = None
    format: Format | None = None
    in_multiple: int = 1
    out_multiple: int = 1  # of the whole fused module
    structures: dict[str, Restriction] = {}
    not_for: dict[str, str] = {}  # structure -> why
    refused: str | None = None
    mend: str | None = None


class FusedRules(_Data):
    """What the shards of one fused module must have in common."""

    same_scheme: bool = False
    block_rows: bool = False  # block scales: every shard but the last has whole blocks of rows
    packed_zero_points: bool = False  # packed zero points: every shard's rows fill whole 32-bit words


class ExpertRules(_Data):
    same_projections: bool = False
    one_scheme_per_model: bool = False
    dense_beside_fp8_only: bool = False


class Target(_Data):
    """One runtime on one kind of hardware. See the files in `data/` for the meaning and the source of every rule."""

    name: str
    runtime: str
    hardware: str
    loader: Literal["vllm", "sglang", "transformers"]
    fused: dict[str, tuple[tuple[str, ...], ...]] = {}
    rows: dict[str, Row]
    notes: dict[str, str] = {}  # row -> what its kernel computes otherwise than the scheme says
    dense: dict[str, str] = {}  # structure -> why it must stay dense
    fused_rules: FusedRules = FusedRules()
    experts: ExpertRules = ExpertRules()
    vocab_padding: int = 1
    kv_cache: tuple[Literal["tensor", "attn_head"], ...] = ()
    head_sizes: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _notes_are_of_rows(self) -> Target:
        if unknown := self.notes.keys() - self.rows.keys():
            raise ValueError(f"notes on rows that are not there: {', '.join(sorted(unknown))}")
        return self

    @property
    def label(self) -> str:
        return f"{self.runtime} ({self.name}: {self.hardware})"

    def takes_kv_cache(self, spec: KVCacheSpec) -> bool:
        return spec.strategy in self.kv_cache


@cache
def target_names() -> tuple[str, ...]:
    """Every target's name, sorted."""
    names = (entry.name.removesuffix(".yaml") for entry in _DATA.iterdir() if entry.name.endswith(".yaml"))
    return tuple(sorted(name for name in names if not _read(name).get("abstract")))


@cache
def load_target(name: str) -> Target:
    """The target `name`. Raises `ConfigError` with near names for an unknown one."""
    if name not in target_names():
        raise ConfigError(
            f"unknown target {name!r}{did_you_mean(name, target_names())}", hint=f"targets: {', '.join(target_names())}"
        )
    try:
        return Target.model_validate({"name": name, **_inherited(name)})
    except ValidationError as error:
        raise ConfigError(f"target file {name}.yaml is malformed: {error}") from None


@cache
def fused_tables(loader: str) -> tuple[FusedNames, ...]:
    """The distinct tables of fused names among the targets that `loader` loads for."""
    tables: list[FusedNames] = []
    for target in map(load_target, target_names()):
        if target.loader == loader and target.fused not in tables:
            tables.append(target.fused)
    return tuple(tables)


def _inherited(name: str) -> dict[str, Any]:
    """The file's keys over those of the file it extends; mappings are joined, a row replaces its namesake whole."""
    own = {key: value for key, value in _read(name).items() if key != "abstract"}
    base_name = own.pop("extends", None)
    if base_name is None:
        return own
    merged = _inherited(base_name)
    for key, value in own.items():
        merged[key] = merged[key] | value if isinstance(value, dict) and key in merged else value
    return merged


@cache
def _read(name: str) -> Mapping[str, Any]:
    """What a target file says. Each is read once, by libyaml where PyYAML was built with it: eight times as fast."""
    text = (_DATA / f"{name}.yaml").read_text(encoding="utf-8")
    data = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert isinstance(data, dict), f"{name}.yaml is not a mapping"
    return data


def _either(values: Any) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
