"""`quantization_config` by itself: what its groups mean, and what loaders refuse of it before they see a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from pydantic import ValidationError

from qcompiler.check.findings import ALL, MODEL, Finding
from qcompiler.emit.schema import TOP_KEYS, parse_quantization_config, read_kv_cache
from qcompiler.errors import ConfigError
from qcompiler.expressions import REGEX_PREFIX, Engine, refusals
from qcompiler.scheme import Format, KVCacheSpec, Scheme, Strategy

_MAX_BITS = 16  # of a code that any loader unpacks
_STORED = frozenset(str(format) for format in Format if format not in (Format.MIXED_PRECISION, "dense"))
"""Formats that say how the tensors of a group are stored."""
_WITH: Mapping[Engine, tuple[str, ...]] = {"re": ("transformers", "sglang"), "regex": ("vllm",)}
"""Who matches expressions with which engine."""
_UNPACKED = (Format.NAIVE_QUANTIZED, Format.INT_QUANTIZED, Format.FLOAT_QUANTIZED)
_ACTIVATION_FORMATS = (*_UNPACKED, Format.NVFP4)


@dataclass(frozen=True, slots=True)
class Group:
    """What a config group means. `format` is the one that counts for its tensors: its own, the common one, or the
    scheme's where neither says, or where there is only one. own: whether it is its own; where not, Transformers takes
    the scheme's.
    """

    scheme: Scheme
    format: Format
    own: bool = field(default=True, compare=False)


@dataclass(frozen=True, slots=True)
class Config:
    """A `quantization_config` that was read. `raw` is in the form that matchers take, without targets that no loader
    can read; `groups` lacks those whose scheme is not known here, and has None where weights stay dense.
    """

    raw: Mapping[str, Any]
    groups: Mapping[str, Group | None]
    kv_cache: KVCacheSpec | None


def read_config_groups(quantization: Mapping[str, Any]) -> tuple[Config, list[Finding]]:
    """The groups, and what is wrong with the config whatever the model is.

    Raises `ConfigError` for an expression that would take forever.
    """
    findings = list(_top(quantization))
    raw_groups: dict[str, dict[str, Any]] = {}
    groups: dict[str, Group | None] = {}
    for name, group in quantization["config_groups"].items():
        written, refused = _validated(name, group)
        targets, bad = _readable(group if isinstance(group, list) else group["targets"], f"group {name}")
        raw_groups[name] = {**written, "targets": targets}
        findings += [*refused, *bad]
        if written:
            if not 0 < (written.get("weights") or {}).get("num_bits", 8) <= _MAX_BITS:
                findings.append(_refused(f"group {name} has num_bits for which there are no codes", *ALL))
                continue
            if not written.get("weights") and not _is_attention(written):
                groups[name] = None
                if not written.get("input_activations"):
                    continue
            try:
                groups[name] = read = _group(name, written, quantization)
            except ConfigError as error:
                findings.append(_unread(name, written, error.message))
            else:
                findings += _formats(name, written, read, quantization)
    kv_cache, wrong = _cache(quantization.get("kv_cache_scheme"))
    ignore, bad = _readable(quantization.get("ignore") or [], "ignore")
    raw = {"config_groups": raw_groups, "ignore": ignore}
    return Config(raw, groups, kv_cache), [*findings, *wrong, *bad]


def _top(quantization: Mapping[str, Any]) -> Iterator[Finding]:
    status = quantization.get("quantization_status")
    if status != "compressed":
        yield Finding.of(
            "not-compressed",
            MODEL,
            ("transformers",),
            f"quantization_status is {str(status)[:40]!r}: Transformers builds dense linears, finds no weights for "
            "them, and leaves them at random without an error",
            'write "quantization_status": "compressed"',
        )
    if quantization.get("transform_config"):
        yield _not_judged("transform_config", "it rotates activations, which is not looked at here")
    if not quantization["config_groups"] and not quantization.get("kv_cache_scheme"):
        message = "config_groups is empty: Transformers raises AttributeError, the others build a dense model"
        yield Finding.of("groups-empty", MODEL, ("transformers",), message, "remove quantization_config")
    for key in quantization:
        if key not in TOP_KEYS and quantization[key]:
            yield Finding.of("key-unknown", MODEL, (), f"loaders ignore the key {str(key)[:80]!r}", "remove it")
    known = {str(member) for member in Format}
    if (common := quantization.get("format")) is not None and common not in known:
        yield _not_judged(f"format {str(common)[:80]!r}", "it is not known here, so it is read from each group")


def _validated(name: str, group: Any) -> tuple[dict[str, Any], list[Finding]]:
    """A group as compressed-tensors' own classes read it, with which vLLM and Transformers read it too; empty where
    they refuse it.
    """
    found = []
    if isinstance(group, list):
        found.append(
            _refused(f"group {name} is a preset's name and its targets: vLLM raises TypeError", "vllm", "sglang")
        )
    elif not group.get("weights") and not _is_attention(group):
        # Transformers leaves its weights dense; with a format, it compresses them first, where activations ask for it.
        acts = isinstance(group, Mapping) and group.get("input_activations") and group.get("format")
        fails = ALL if acts and group["format"] != Format.DENSE else ("vllm", "sglang")
        too = ", Transformers AttributeError" if "transformers" in fails else ""
        message = f"group {name} has no weights: vLLM raises ValidationError{too}"
        mend = f"give group {name} its weights, or remove it and add its targets to ignore"
        found.append(Finding.of("group-invalid", MODEL, fails, message, mend))
    try:
        scheme = QuantizationConfig.model_validate({"config_groups": {name: group}}).config_groups[name]
    except ValidationError as error:
        first = error.errors()[0]
        # Pydantic also names the members of unions that it tried.
        place = [name, *(str(part) for part in first["loc"][2:] if str(part).isidentifier() and str(part)[0].islower())]
        why = f"{'.'.join(place)}: {first['msg'].removeprefix('Value error, ')}"
        # vLLM reads the parts of a group by themselves, and does not look at other keys.
        of_group = first["type"] == "extra_forbidden" and len(place) == 2
        loaders = ("transformers",) if of_group else ALL
    except Exception as error:  # its validators raise NotImplementedError, KeyError and others too
        why, loaders = f"{name}: {type(error).__name__}: {str(error)[:200]}", ALL
    else:
        return scheme.model_dump(mode="json"), found
    return {}, [*found, _refused(f"compressed-tensors refuses group {why}", *loaders)]


def _refused(message: str, *loaders: str) -> Finding:
    mend = "write the group out as the library does: targets, weights, input_activations, format"
    return Finding.of("group-invalid", MODEL, loaders, message, mend)


def _is_attention(group: Mapping[str, Any]) -> bool:
    """A group for one attention class describes the KV cache; vLLM skips it."""
    targets = group["targets"]
    return len(targets) == 1 and str(targets[0]).endswith("Attention")


def _group(name: str, written: Mapping[str, Any], quantization: Mapping[str, Any]) -> Group:
    """Raises `ConfigError` for what this package has no scheme for."""
    common = quantization.get("format")
    known = common if common in {str(member) for member in Format} else None
    (parsed,) = parse_quantization_config({"format": known, "config_groups": {name: written}}).groups
    explicit = written.get("format") or (known if known not in ("mixed-precision", "dense") else None)
    by_format = explicit and not _known_by_numbers(parsed.scheme)
    format = parsed.format if by_format else parsed.scheme.format
    return Group(parsed.scheme, format, own=bool(written.get("format")))


def _known_by_numbers(scheme: Scheme) -> bool:
    """Whether vLLM and SGLang look at no format: for NVFP4 and MX, their tensors lie in one way only."""
    return scheme.weights.is_nvfp4 or scheme.weights.is_mx


def _unread(name: str, written: Mapping[str, Any], why: str) -> Finding:
    """A group that this package has no scheme for: does any loader have one?"""
    weights = written.get("weights") or {}
    type_, bits, size = weights.get("type"), weights.get("num_bits", 8), weights.get("group_size")
    four = (weights.get("strategy"), size) in ((Strategy.TENSOR_GROUP, 16), (Strategy.GROUP, 32))
    if type_ == "float":
        known = weights.get("symmetric") and (bits == 8 or (bits == 4 and four))
    else:
        known = bits in range(2, 9) and weights.get("strategy") != Strategy.TENSOR_GROUP
    if not weights or known:
        return _not_judged(f"group {name}", why)
    if type_ == "float" and bits == 4 and not four:
        why = "weights: 4-bit floats have groups of 16 (NVFP4, strategy tensor_group) or of 32 (MXFP4, strategy group)"
    format = written.get("format") or (Format.NAIVE_QUANTIZED if size not in (16, 32) else None)
    eight = type_ == "float" and bits != 8 and format in (*_UNPACKED, Format.MXFP8)
    packed = type_ == "int" and bits > 8 and format == Format.PACK_QUANTIZED
    return Finding.of(
        "format-unread",
        MODEL,
        ALL if eight or packed else ("vllm", "sglang"),
        f"group {name}: {why.removeprefix(f'config_groups.{name}.')}: vLLM raises NotImplementedError"
        + (", Transformers too" if eight or packed else ""),
        "correct what it says of its weights, or quantize again with numbers that loaders have",
    )


def _formats(name: str, written: Mapping[str, Any], group: Group, quantization: Mapping[str, Any]) -> Iterator[Finding]:
    scheme = group.scheme
    mixed = quantization.get("format") == Format.MIXED_PRECISION
    by_format = not _known_by_numbers(scheme)
    common = quantization.get("format")
    written_format = "missing" if common is None else str(common)[:80]
    if not written.get("format") and (mixed or (by_format and common not in _STORED)):
        code = "group-format-missing" if by_format else "format-untidy"
        does = "vLLM raises NotImplementedError" if by_format else "loaders know this scheme without it"
        yield Finding.of(
            code,
            MODEL,
            ("vllm", "sglang") if by_format else (),
            f"format is {written_format} and group {name} ({scheme.short}) has none of its own: {does}",
            f'write "format": "{scheme.format}" into the group',
        )
    elif group.format is Format.MXFP8 and not scheme.weights.is_mx and scheme.weights.type == "float":
        yield Finding.of(
            "scale-dtype-missing",
            MODEL,
            ("vllm", "transformers"),
            f"group {name} is {group.format} without scale_dtype: vLLM does not know it as MXFP8 and raises, "
            "Transformers multiplies by the exponents",
            'write "scale_dtype": "torch.uint8" into weights and input_activations',
        )
    elif not by_format and (own := written.get("format")) not in (None, scheme.format):
        yield Finding.of(
            "format-disagrees",
            MODEL,
            ("transformers",),
            f"group {name} is {scheme.short} in format {str(own)[:80]}: Transformers reads other numbers, "
            "or raises; vLLM knows this scheme by its numbers",
            f'write "format": "{scheme.format}" into the group',
        )
    elif not _vllm_takes(group):
        yield Finding.of(
            "format-unread",
            MODEL,
            ("vllm",),
            f"group {name} is {scheme.short} in format {group.format}: vLLM raises NotImplementedError (No "
            "compressed-tensors compatible scheme was found)",
            f"store it as {scheme.format}",
        )
    args = {part: written.get(part) or {} for part in ("weights", "input_activations")}
    if scheme.weights.is_nvfp4 and any(args[part] and not args[part].get("scale_dtype") for part in args):
        yield Finding.of(
            "scale-dtype-absent",
            MODEL,
            ("transformers",),
            f"group {name} is NVFP4 without scale_dtype: Transformers leaves the scales of activations unrounded, "
            "vLLM rounds them to FP8",
            'write "scale_dtype": "torch.float8_e4m3fn" into weights and input_activations',
        )


def of_other_type(name: str, group: Group) -> Iterator[Finding]:
    """A format for the other type of numbers, where the codes are of the type that the group says."""
    other = Format.FLOAT_QUANTIZED if group.scheme.weights.type == "int" else Format.INT_QUANTIZED
    if group.format is other and _vllm_takes(group):
        message = f"group {name} is {group.scheme.short} in format {other}: loaders go by the type"
        mend = f'write "format": "{group.scheme.format}" into the group'
        yield Finding.of("format-untidy", MODEL, (), message, mend)


def _vllm_takes(group: Group) -> bool:
    """Whether `_get_scheme_from_parts` of vLLM 0.32 finds a class for a scheme in this format, on some hardware."""
    weights, inputs, format = group.scheme.weights, group.scheme.input_activations, group.format
    if _known_by_numbers(group.scheme):
        return True
    if weights.type == "float":
        return format in _ACTIVATION_FORMATS
    if inputs is None:
        return format is Format.PACK_QUANTIZED and weights.strategy in (Strategy.GROUP, Strategy.CHANNEL)
    if format is Format.PACK_QUANTIZED:  # W4A8Fp8, WNA8Int
        return inputs.type == "float" or (inputs.dynamic is True and inputs.symmetric)
    if inputs.type == "float" or not weights.symmetric or format not in _ACTIVATION_FORMATS:
        return False
    if weights.bits == inputs.bits == 8:  # W8A8Int8
        return weights.strategy in (Strategy.TENSOR, Strategy.CHANNEL)
    grouped = weights.strategy in (Strategy.GROUP, Strategy.CHANNEL)
    return (weights.bits, inputs.bits) == (4, 8) and grouped and inputs.strategy is Strategy.TOKEN  # W4A8Int


def _cache(written: Any) -> tuple[KVCacheSpec | None, list[Finding]]:
    if not written:
        return None, []
    try:
        args = QuantizationArgs.model_validate(written).model_dump(mode="json")
        return read_kv_cache(args, "kv_cache_scheme"), []
    except Exception as error:  # the library's validators raise whatever Python raises
        why = error.message if isinstance(error, ConfigError) else f"kv_cache_scheme: {str(error)[:200]}"
        message = f"{why}: loaders ignore it or raise; they take FP8, static, per tensor or attention head"
        mend = 'write {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false, "symmetric": true}'
        return None, [Finding.of("cache-invalid", MODEL, ALL, message, mend)]


def _readable(entries: list[str], where: str) -> tuple[list[str], list[Finding]]:
    """The entries that are names or valid expressions, and findings about the others."""
    kept, bad = [], []
    for entry in entries:
        refused = refusals(entry) if entry.startswith(REGEX_PREFIX) else {}
        if len(refused) < len(_WITH):
            kept.append(entry)  # what some loaders take counts for them
        if refused:
            loaders = [loader for engine, who in _WITH.items() if engine in refused for loader in who]
            whose = "every loader raises" if len(refused) == len(_WITH) else f"{', '.join(loaders)} raise"
            (why, *_) = refused.values()
            message = f"{where}: target {entry[:200]!r} is not a regular expression: {why}: {whose} re.error"
            mend = "escape what is meant literally: dots, brackets; write flags first, `re:(?i)`"
            bad.append(Finding.of("target-invalid", MODEL, [each for each in ALL if each in loaders], message, mend))
    return kept, bad


def _not_judged(what: str, why: str) -> Finding:
    return Finding.of("not-judged", MODEL, (), f"{what} is not judged: {why}", "judge it in the runtime that serves it")
