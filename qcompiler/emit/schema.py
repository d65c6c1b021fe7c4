"""`quantization_config` as compressed-tensors spells it: writing its parts, and reading whole ones back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.scheme import Format, KVCacheSpec, QuantSpec, Scheme, Strategy, preset

QUANT_METHOD = "compressed-tensors"

TOP_KEYS = (
    *("quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme", "version"),
    *("global_compression_ratio", "sparsity_config", "transform_config", "packed_modules_mapping"),
)
_GROUP_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
_ARGS_KEYS = (
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
)


@dataclass(frozen=True, slots=True)
class ConfigGroup:
    """One of `config_groups`."""

    name: str
    scheme: Scheme
    targets: tuple[str, ...]
    format: Format


@dataclass(frozen=True, slots=True)
class ParsedConfig:
    """A `quantization_config` that was read: what is quantized how, in the file's order."""

    groups: tuple[ConfigGroup, ...]
    ignore: tuple[str, ...]
    kv_cache: KVCacheSpec | None


def quantization_args(spec: QuantSpec) -> dict[str, Any]:
    """`QuantizationArgs` for one tensor, with only the keys that matter: older loaders refuse the newer ones."""
    args: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": spec.type,
        "symmetric": spec.symmetric,
        "strategy": str(spec.strategy),
        "dynamic": spec.dynamic,
    }
    if spec.group_size is not None:
        args["group_size"] = spec.group_size
    if spec.block_structure is not None:
        args["block_structure"] = list(spec.block_structure)
    if spec.scale_dtype is not None:
        args["scale_dtype"] = f"torch.{spec.scale_dtype}"
    return args


def scheme_dict(scheme: Scheme) -> dict[str, Any]:
    """One entry of `config_groups`, without its targets."""
    activations = scheme.input_activations
    return {
        "weights": quantization_args(scheme.weights),
        "input_activations": None if activations is None else quantization_args(activations),
        "output_activations": None,
        "format": str(scheme.format),
    }


def kv_cache_dict(spec: KVCacheSpec) -> dict[str, Any]:
    """`kv_cache_scheme`: FP8, symmetric, static."""
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": spec.strategy, "dynamic": False}


def parse_quantization_config(config: Mapping[str, Any]) -> ParsedConfig:
    """Read a `quantization_config`, ours or another tool's. Raises `ConfigError` on what this package cannot mean."""
    _refuse_unknown(config, TOP_KEYS, "quantization_config")
    if config.get("quant_method", QUANT_METHOD) != QUANT_METHOD:
        raise ConfigError(
            f"quantization_config has quant_method {config['quant_method']!r}",
            hint=f"only {QUANT_METHOD!r} checkpoints are read here",
        )
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            raise ConfigError(
                f"quantization_config has a {key}", hint="sparse and transformed checkpoints are not read"
            )
    default_format = config.get("format")
    groups = tuple(_group(name, group, default_format) for name, group in (config.get("config_groups") or {}).items())
    cache = config.get("kv_cache_scheme")
    kv_cache = read_kv_cache(cache, "kv_cache_scheme") if cache else None
    return ParsedConfig(groups, tuple(config.get("ignore") or ()), kv_cache)


def _group(name: str, group: Any, default_format: str | None) -> ConfigGroup:
    where = f"config_groups.{name}"
    if isinstance(group, list):  # a preset's name and its targets
        scheme = preset(name)
        return ConfigGroup(name, scheme, tuple(group), _format(default_format, scheme, where))
    _refuse_unknown(group, _GROUP_KEYS, where)
    if group.get("output_activations"):
        raise ConfigError(f"{where} quantizes output_activations", hint="only weights and input_activations are read")
    weights = group.get("weights")
    if not weights:
        raise ConfigError(f"{where} has no weights", hint="a group without weights describes attention: not read here")
    activations = group.get("input_activations")
    try:
        specs = {
            "weights": read_args(weights, f"{where}.weights"),
            "input_activations": read_args(activations, f"{where}.input_activations") if activations else None,
        }
        scheme = Scheme.model_validate(specs)
    except ValidationError as error:
        raise ConfigError(f"{where}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    return ConfigGroup(
        name, scheme, tuple(group.get("targets") or ()), _format(group.get("format") or default_format, scheme, where)
    )


def read_args(args: Mapping[str, Any], where: str) -> QuantSpec:
    """`QuantizationArgs` as the library understands them: without a strategy, the group size says it.

    Raises `ConfigError` that names `where` on what this package cannot mean.
    """
    _refuse_unknown(args, _ARGS_KEYS, where)
    if args.get("actorder") in ("group", "dynamic", True):
        raise ConfigError(
            f"{where} has actorder {args['actorder']!r}",
            hint="activation ordering with a g_idx tensor is gone from loaders: only static (weight) ordering is read",
        )
    type_, bits, strategy = args.get("type", "int"), args.get("num_bits", 8), args.get("strategy")
    group_size = args.get("group_size")
    if group_size is not None and group_size <= 0:  # -1: older writers' per-channel
        group_size, strategy = None, strategy if strategy not in (None, "group") else "channel"
    if strategy is None:
        strategy = Strategy.TENSOR if group_size is None else Strategy.GROUP
    fields: dict[str, Any] = {
        "type": type_,
        "bits": bits,
        "symmetric": args.get("symmetric", True),
        "strategy": strategy,
        "group_size": group_size,
        "block_structure": args.get("block_structure"),
        "dynamic": args.get("dynamic") or False,
        "scale_dtype": _scale_dtype(args.get("scale_dtype"), type_, bits, strategy),
    }
    try:
        return QuantSpec.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{where}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _scale_dtype(written: str | None, type_: str, bits: int, strategy: str | None) -> str | None:
    """Writers before 0.13 leave it out, where only one value is possible."""
    if written is not None:
        return written.removeprefix("torch.")
    if strategy == Strategy.TENSOR_GROUP:
        return "float8_e4m3fn"
    return "uint8" if (type_, bits) == ("float", 4) else None


def _format(written: str | None, scheme: Scheme, where: str) -> Format:
    if written is None or written == Format.MIXED_PRECISION:
        return scheme.format
    try:
        return Format(written)
    except ValueError:
        raise ConfigError(
            f"{where} has format {written!r}{did_you_mean(written, list(Format))}",
            hint=f"formats read here: {', '.join(Format)}",
        ) from None


def read_kv_cache(args: Mapping[str, Any], where: str) -> KVCacheSpec:
    """`kv_cache_scheme`. Raises `ConfigError` that names `where` on anything but static FP8."""
    spec = read_args(args, where)
    fp8 = (spec.type, spec.bits, spec.symmetric, spec.dynamic) == ("float", 8, True, False)
    if not fp8 or spec.strategy not in (Strategy.TENSOR, Strategy.ATTN_HEAD):
        raise ConfigError(
            f"{where} is {spec.short}",
            hint="the KV cache that loaders take is FP8, static, with one scale per tensor or per attention head",
        )
    return KVCacheSpec.model_validate({"strategy": str(spec.strategy)})


def _refuse_unknown(keys: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if not isinstance(keys, Mapping):
        raise ConfigError(f"{where} is {keys!r}, not a mapping")
    for key in keys:
        if key not in known:
            raise ConfigError(f"{where} has the unknown key {key!r}{did_you_mean(key, known)}")
