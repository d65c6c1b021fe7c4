"""Which config group each loader gives to each module: their matching rules, written out, with no import of theirs.

Loaders disagree about overlapping targets, class names, fused modules, expressions and `ignore`. The emitter runs every
matcher here on the config that it is to write; `tools/serve/fuzz_matchers.py` holds them to the loaders' own functions.

Sources:
- vLLM 0.32.0, `layers/quantization/compressed_tensors/{compressed_tensors,utils}.py`, `utils/config_utils.py`;
- compressed-tensors 0.17.0 and 0.20.0, `utils/match.py` (alike where it matters here), with Transformers 5.17
  `integrations/compressed_tensors.py` for experts;
- SGLang 0.5.23, `srt/layers/quantization/compressed_tensors/{compressed_tensors,utils}.py`, and 0.5.10, whose plain
  `ignore` entries match as substrings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qcompiler.emit.patterns import TargetList
from qcompiler.emit.sites import EXPERT_PROJECTIONS, FusedNames, RuntimeModule, Site, runtime_modules
from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.expressions import Engine

Shards = Mapping[str, Sequence[str]]
IgnoreRule = Literal["suffix", "substring"]


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a loader decides for one of its modules: a config group (None: dense), or the error it raises."""

    module: RuntimeModule
    group: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """A loader's whole decision. `groups` maps every site to its group's name, or None for dense."""

    loader: str
    resolutions: tuple[Resolution, ...]

    @property
    def groups(self) -> dict[str, str | None]:
        return {site.name: r.group for r in self.resolutions for site in r.module.sites}


class LoaderError(Exception):
    """The loader raises here; the text is its exception. `assignment` turns it into a `Resolution.error`."""


def assignment(loader: str, config: Mapping[str, Any], sites: Sequence[Site], fused: FusedNames) -> Assignment:
    """The group that `loader` (one of `LOADERS`) gives to every site under `quantization_config` dict `config`.

    `fused` is the runtime's fused names (unused by Transformers, which fuses nothing). Raises `ConfigError` for an
    unknown loader and for a regular expression that is invalid or does not finish.
    """
    if loader not in _MATCHERS:
        raise ConfigError(
            f"unknown loader {loader!r}{did_you_mean(loader, _MATCHERS)}", hint=f"loaders: {', '.join(_MATCHERS)}"
        )
    modules = runtime_modules(sites, {} if loader == "transformers" else fused)
    return Assignment(loader, tuple(_MATCHERS[loader](config, modules)))


def group_of_target(config: Mapping[str, Any]) -> dict[str, str]:
    """Target -> group name, in the order loaders build their map: a repeated target keeps its place, not its group."""
    return {target: name for name, group in config["config_groups"].items() for target in group["targets"]}


def without_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    """The groups as vLLM has them: those for one attention class describe the KV cache, and are dropped at once."""
    kept = {
        name: group
        for name, group in config["config_groups"].items()
        if not (len(group["targets"]) == 1 and group["targets"][0].endswith("Attention"))
    }
    return {"config_groups": kept}


# --- vLLM -----------------------------------------------------------------------------------------------------------


def vllm_matched_target(name: str, class_name: str, targets: TargetList, shards: Shards) -> str | None:
    """`find_matched_target`: the module's own name, then all its shards' names, then a part of the class name."""
    return targets.first(name) or _matched_by_shards(name, targets, shards) or targets.first_containing(class_name)


def _matched_by_shards(name: str, targets: TargetList, shards: Shards) -> str | None:
    fused = next((key for key in shards if name.endswith(key)), None)
    if fused is None:
        return None
    matches = [targets.first(name.replace(fused, shard)) for shard in shards[fused]]
    return matches[0] if all(matches) else None


def vllm_ignores(name: str, ignore: TargetList, shards: Shards) -> bool:
    """`should_ignore_layer`. Raises where `ignore` covers some shards of a fused module and not others."""
    if ignore.first(name) is not None:
        return True
    leaf = name.split(".")[-1]
    if leaf not in shards:
        return False
    ignored = [ignore.first(name.replace(leaf, shard)) is not None for shard in shards[leaf]]
    if any(ignored) and not all(ignored):
        raise LoaderError(
            f"ValueError: Found different quantization schemes for the shards of {name}. vLLM requires all to use the "
            "same scheme."
        )
    return all(ignored)


def _vllm(config: Mapping[str, Any], modules: Sequence[RuntimeModule]) -> list[Resolution]:
    groups = config["config_groups"]
    group_of = group_of_target(without_attention(config))
    targets, moe_targets = _target_lists(group_of, "regex", "RoutedExperts")
    ignore = TargetList(config.get("ignore") or (), "regex")
    mapping = _shard_mapping(modules)

    def matched(name: str, class_name: str, targets: TargetList, shards: Shards) -> str | None:
        if vllm_ignores(name, ignore, shards):
            return None
        target = vllm_matched_target(name, class_name, targets, shards)
        return None if target is None else group_of[target]

    def resolve(module: RuntimeModule) -> str | None:
        shards = _shards_for(module, mapping)
        if module.is_expert_block:
            found = [matched(name, "RoutedExperts", moe_targets, shards) for name in _first_expert(module)]
            return _one_expert_group(found, groups)
        if is_lm_head(module):
            try:
                return matched(module.name, "ParallelLMHead", targets, shards)
            except LoaderError:
                return None  # vLLM catches the ValueError and leaves the head dense
        return matched(module.name, vllm_class(module), targets, shards)

    return _resolve_all(modules, resolve)


def vllm_class(module: RuntimeModule) -> str:
    if len(module.sites) > 1:
        return "QKVParallelLinear" if len(module.shards) == 3 else "MergedColumnParallelLinear"
    output = module.sites[0].structure in ("attention-output", "mlp-output")
    return "RowParallelLinear" if output else "ColumnParallelLinear"


# --- Transformers ---------------------------------------------------------------------------------------------------


def transformers_order(targets: Iterable[str]) -> TargetList:
    """The order in which `match_targets` tries targets: plain ones, then expressions, each alphabetically."""
    return TargetList(sorted(targets, key=lambda target: ("re:" in target, target)), "re")


def transformers_matched_target(name: str, classes: Sequence[str], ordered: TargetList) -> str | None:
    """First of `match_targets`: by name in that order, then by a class name of the module's MRO."""
    by_name = ordered.first(name)
    return by_name if by_name is not None else next((t for t in ordered.targets if t in classes), None)


def transformers_ignores(name: str, classes: Sequence[str], ignore: TargetList) -> bool:
    """`is_match` against `ignore`: by name, expression, or class name."""
    return ignore.first(name) is not None or any(entry in classes for entry in ignore.targets)


def transformers_experts_group(config: Mapping[str, Any]) -> str | None:
    """`get_experts_scheme`: Transformers gives all experts of a model one group, found without their names."""
    groups = config["config_groups"]
    for name, group in groups.items():
        if any(target.startswith("re:") and "experts" in target for target in group["targets"]):
            return str(name)
    for name, group in groups.items():
        if any(not target.startswith("re:") for target in group["targets"]):
            return str(name)
    return next(iter(groups), None)


def _transformers(config: Mapping[str, Any], modules: Sequence[RuntimeModule]) -> list[Resolution]:
    group_of = group_of_target(config)
    targets, ignore = transformers_order(group_of), TargetList(config.get("ignore") or (), "re")
    experts_group = transformers_experts_group(config)
    weights = {name: group.get("weights") or {} for name, group in config["config_groups"].items()}
    fp8_groups = {name for name, w in weights.items() if (w.get("type"), w.get("num_bits")) == ("float", 8)}

    def resolve(module: RuntimeModule) -> str | None:
        if module.is_expert_block:
            # The experts' converter asks for packed weights and scales; for FP8, weights without a scale pass through.
            dense = all(site.scheme is None for site in module.sites)
            return None if dense and experts_group in fp8_groups else experts_group
        site = module.sites[0]
        if site.kind == "conv1d":
            return None  # only nn.Linear and nn.Embedding are quantized
        classes = tuple(dict.fromkeys((site.class_name, "Linear", "Module")))
        if transformers_ignores(site.name, classes, ignore):
            return None
        matched = transformers_matched_target(site.name, classes, targets)
        return None if matched is None else group_of[matched]

    return _resolve_all(modules, resolve)


# --- SGLang ---------------------------------------------------------------------------------------------------------


def sglang_matched_target(name: str, class_name: str, targets: TargetList, shards: Shards) -> str:
    """`find_matched_target`: as vLLM's, but the class comes before the shards, and no match raises."""
    matched = targets.first(name) or targets.first_containing(class_name) or _matched_by_shards(name, targets, shards)
    if matched is None:
        raise LoaderError(f"ValueError: Unable to find matching target for {name} in the compressed-tensors config.")
    return matched


def sglang_ignores(name: str, ignore: TargetList, shards: Shards, rule: IgnoreRule) -> bool:
    """`should_ignore_layer`; `rule` is how a plain entry matches: a dotted suffix (0.5.23) or a substring (0.5.10)."""
    covers = ignore.first_suffix if rule == "suffix" else ignore.first_containing
    leaf = name.split(".")[-1]
    if leaf not in shards or name in ignore.targets:
        return covers(name) is not None
    ignored = [covers(name.replace(leaf, shard)) is not None for shard in shards[leaf]]
    if any(ignored) and not all(ignored):
        raise LoaderError(
            f"ValueError: Found different quantization schemes for {list(shards[leaf])} in {name}. SGLang requires all "
            "to use the same scheme."
        )
    return all(ignored)


def _sglang(config: Mapping[str, Any], modules: Sequence[RuntimeModule], *, rule: IgnoreRule) -> list[Resolution]:
    groups = config["config_groups"]
    group_of = group_of_target(config)
    targets, moe_targets = _target_lists(group_of, "re", "FusedMoE", "DeepEPMoE")
    ignore = TargetList(config.get("ignore") or (), "re")
    mapping = _shard_mapping(modules)

    def matched(name: str, class_name: str, targets: TargetList, shards: Shards) -> str | None:
        if sglang_ignores(name, ignore, shards, rule) or not targets.targets:
            return None
        return group_of[sglang_matched_target(name, class_name, targets, shards)]

    def resolve(module: RuntimeModule) -> str | None:
        shards = _shards_for(module, mapping)
        if module.is_expert_block:
            names = [f"{module.name}.0.{projection}" for projection in EXPERT_PROJECTIONS]
            return _one_expert_group([matched(name, "FusedMoE", moe_targets, shards) for name in names], groups)
        if is_lm_head(module):
            if sglang_ignores(module.name, ignore, shards, rule):
                return None
            target = targets.first_suffix(module.name)  # by name only: a class such as `Linear` never covers the head
            return None if target is None else group_of[target]
        return matched(module.name, vllm_class(module), targets, shards)

    return _resolve_all(modules, resolve)


# --- shared ---------------------------------------------------------------------------------------------------------


def _resolve_all(modules: Sequence[RuntimeModule], resolve: Callable[[RuntimeModule], str | None]) -> list[Resolution]:
    resolutions = []
    for module in modules:
        try:
            resolutions.append(Resolution(module, group=resolve(module)))
        except LoaderError as error:
            resolutions.append(Resolution(module, error=str(error)))
    return resolutions


def _target_lists(group_of: dict[str, str], engine: Engine, *moe_classes: str) -> tuple[TargetList, TargetList]:
    """The targets for linears, and for experts: there `Linear` also stands for the runtime's experts class."""
    targets = TargetList(group_of, engine)
    if "Linear" not in group_of or moe_classes[0] in group_of:
        return targets, targets
    group_of.update(dict.fromkeys(moe_classes, group_of["Linear"]))
    return targets, TargetList(group_of, engine)


def _shard_mapping(modules: Sequence[RuntimeModule]) -> dict[str, Sequence[str]]:
    """The model class's `packed_modules_mapping`, as far as this model uses it."""
    return {m.name.rpartition(".")[2]: m.shards for m in modules if m.shards}


def _shards_for(module: RuntimeModule, mapping: dict[str, Sequence[str]]) -> Shards:
    return mapping | {module.name.rpartition(".")[2]: module.shards} if module.shards else mapping


def is_lm_head(module: RuntimeModule) -> bool:
    site = module.sites[0]
    return len(module.sites) == 1 and (site.structure == "lm-head" or site.leaf == "lm_head")


def _first_expert(module: RuntimeModule) -> list[str]:
    """The names vLLM asks for: expert 0's projections, under the names the checkpoint uses."""
    leaves = dict.fromkeys(site.leaf for site in module.sites)
    return [f"{module.name}.0.{leaf}" for leaf in leaves]


def _one_expert_group(found: Sequence[str | None], groups: Mapping[str, Any]) -> str | None:
    contents = [None if name is None else {k: v for k, v in groups[name].items() if k != "targets"} for name in found]
    if any(content != contents[0] for content in contents):
        raise LoaderError("ValueError: All MoE projections need to have same quantization scheme but found multiple")
    return found[0]


_Matcher = Callable[[Mapping[str, Any], Sequence[RuntimeModule]], list[Resolution]]
_MATCHERS: dict[str, _Matcher] = {
    "vllm": _vllm,
    "transformers": _transformers,
    "sglang": lambda config, modules: _sglang(config, modules, rule="suffix"),
    "sglang-substring": lambda config, modules: _sglang(config, modules, rule="substring"),
}
LOADERS = tuple(_MATCHERS)
"""`sglang-substring` is SGLang 0.5.10's reading of `ignore`; `sglang` is 0.5.23's."""
