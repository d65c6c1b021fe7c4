"""Write `quantization_config` from sites, and prove that every loader reads it as it was meant.

One group per distinct scheme, targets that overlap nowhere, every dense linear in `ignore` (SGLang raises on a linear
that it finds in neither). The proof runs each loader's matching over all sites; compact targets stay only if it passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from qcompiler.emit.compact import compact_targets, exact_expression, exact_targets
from qcompiler.emit.matchers import Resolution, assignment
from qcompiler.emit.schema import QUANT_METHOD, kv_cache_dict, scheme_dict
from qcompiler.emit.sites import FusedNames, Site
from qcompiler.errors import ConfigError, VerificationError
from qcompiler.scheme import Format, KVCacheSpec, Scheme
from qcompiler.targets import fused_tables

_MATCHERS_OF = {
    "vllm": ("vllm",),
    "transformers": ("transformers",),
    "sglang": ("sglang", "sglang-substring"),  # its releases differ in how `ignore` matches
}
LOADERS = tuple(_MATCHERS_OF)
"""Every loader whose reading of a config can be proved."""

_FusedTables = Callable[[str], Sequence[FusedNames]]
_TargetsOf = Callable[[Sequence[Site], Mapping[str, Hashable]], dict[Hashable, list[str]]]


@dataclass(frozen=True, slots=True)
class EmittedConfig:
    """The dict for config.json and what was proved of it. `exact_names_because` is None where compact targets do."""

    config: dict[str, Any]
    loaders: tuple[str, ...]
    sites: int
    quantized: int
    exact_names_because: str | None

    @property
    def summary(self) -> str:
        targets = sum(len(group["targets"]) for group in self.config["config_groups"].values())
        form = f"; exact names because {self.exact_names_because}" if self.exact_names_because else ""
        return (
            f"{self.quantized} of {self.sites} sites quantized by {len(self.config['config_groups'])} groups with "
            f"{targets} targets, read alike by {', '.join(self.loaders)}{form}"
        )


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One loader that would read the config otherwise than it was meant."""

    loader: str
    name: str
    message: str


def build_quantization_config(
    sites: Sequence[Site],
    *,
    also: Sequence[Site] = (),
    kv_cache: KVCacheSpec | None = None,
    loaders: Sequence[str] = LOADERS,
) -> EmittedConfig:
    """The `quantization_config` of a model whose linears are `sites`, dense ones too, proved against `loaders`.

    also: the same linears by other names that a loader may know them by; the config means the same by those.
    Raises `ConfigError` where there is nothing to quantize or a loader is unknown, and `VerificationError` where no
    form of the config is read alike by every loader; it names the loader and the module.
    """
    named = [*sites, *also]
    _check_inputs(named, kv_cache, loaders)
    # Transformers gives all experts the first group with a target that says `experts`; `shared_experts` says it too.
    experts_first = sorted(named, key=lambda site: site.expert_block is None)
    schemes = list(dict.fromkeys(site.scheme for site in experts_first if site.scheme is not None))

    def build(targets_of: _TargetsOf) -> dict[str, Any]:
        label_of: dict[str, Hashable] = {site.name: site.scheme for site in named}
        return _config(schemes, targets_of(named, label_of), _ignore(named), kv_cache)

    config, exact_because = build(compact_targets), None
    disagreements = prove(config, named, loaders)
    if disagreements:
        exact_because = disagreements[0].message
        config = build(exact_targets)
        disagreements = prove(config, named, loaders)
    if disagreements:
        first = disagreements[0]
        raise VerificationError(
            f"{len(disagreements)} modules would load otherwise than compiled; first: {first.message}",
            hint=f"give all of {first.name} one scheme, or choose a --target whose runtime is not {first.loader}",
        )
    quantized = sum(site.scheme is not None for site in sites)
    return EmittedConfig(config, tuple(loaders), len(sites), quantized, exact_because)


def prove(
    config: Mapping[str, Any], sites: Sequence[Site], loaders: Sequence[str], *, fused: _FusedTables = fused_tables
) -> list[Disagreement]:
    """Every site where a loader's matching gives another scheme than the site's own, or raises.

    fused: the tables of fused names that a loader may meet. All are tried: a checkpoint does not know its hardware.
    """
    contents = {name: {k: v for k, v in g.items() if k != "targets"} for name, g in config["config_groups"].items()}
    meant = {site.name: None if site.scheme is None else scheme_dict(site.scheme) for site in sites}
    disagreements = []
    for loader in loaders:
        for matcher, names in itertools.product(_MATCHERS_OF[loader], fused(loader)):
            for resolution in assignment(matcher, config, sites, names).resolutions:
                message = _difference(resolution, contents, meant)
                if message is not None:
                    disagreements.append(Disagreement(loader, resolution.module.name, f"{matcher} {message}"))
    return disagreements


def _difference(
    resolution: Resolution, contents: Mapping[str, Any], meant: Mapping[str, dict[str, Any] | None]
) -> str | None:
    module = resolution.module
    if resolution.error is not None:
        return f"raises at {module.name}: {resolution.error}"
    found = None if resolution.group is None else contents[resolution.group]
    for site in module.sites:
        if found != meant[site.name]:
            where = site.name if site.name == module.name else f"{site.name} (in its module {module.name})"
            read = f"group {resolution.group}" if resolution.group else "dense"
            return f"reads {where} as {read}, but it is {site.scheme.short if site.scheme else 'dense'}"
    return None


def _check_inputs(sites: Sequence[Site], kv_cache: KVCacheSpec | None, loaders: Sequence[str]) -> None:
    names = [site.name for site in sites]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"two sites have the name {twice!r}")
    if kv_cache is None and all(site.scheme is None for site in sites):
        raise ConfigError("nothing is quantized: there is no quantization_config to write")
    for loader in loaders:
        if loader not in _MATCHERS_OF:
            raise ConfigError(f"unknown loader {loader!r}", hint=f"loaders: {', '.join(_MATCHERS_OF)}")


def _config(
    schemes: Sequence[Scheme],
    targets: Mapping[Hashable, Sequence[str]],
    ignore: Sequence[str],
    kv_cache: KVCacheSpec | None,
) -> dict[str, Any]:
    formats = sorted({scheme.format for scheme in schemes})
    return {
        "quant_method": QUANT_METHOD,
        "format": str(formats[0] if len(formats) == 1 else Format.MIXED_PRECISION if formats else Format.DENSE),
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": list(targets[scheme]), **scheme_dict(scheme)} for i, scheme in enumerate(schemes)
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None if kv_cache is None else kv_cache_dict(kv_cache),
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": version("compressed-tensors"),
    }


def _ignore(sites: Sequence[Site]) -> list[str]:
    """Every dense linear by name; experts by expression, which would be thousands of names."""
    quantized = "\n".join(site.name for site in sites if site.scheme is not None).lower()
    dense_experts = {s.name: "dense" if s.scheme is None and s.expert_block else None for s in sites}
    experts = compact_targets(sites, dense_experts) if any(dense_experts.values()) else {}
    ignore: list[str] = experts.get("dense", [])
    for site in sites:
        if site.scheme is None and site.expert_block is None:
            # A plain `mlp.gate` also swallows `mlp.gate_proj` in SGLang releases that look for substrings.
            loose = site.name.lower() in quantized
            ignore.append(exact_expression(site.name) if loose else site.name)
    return ignore
