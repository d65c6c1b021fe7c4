"""What a check finds: each finding with its severity, the layer, what will happen in which loader, and the mend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

MODEL = "(model)"
"""The layer of a finding that belongs to none."""

ALL = ("vllm", "transformers", "sglang")
"""The loaders, as findings name them. `sglang 0.5.10` is that release, whose `ignore` matches substrings."""


SCHEMA_VERSION = 1
"""Of a report as JSON. Keys and codes may be added under one version; none goes, or changes its meaning."""


class Severity(StrEnum):
    """An error: a loader fails or loads wrong values, or two loaders disagree. Info: it is only untidy."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Kind:
    """How severe a finding of one code is, and what it says, in a line."""

    severity: Severity
    says: str


def _kinds(severity: Severity, **says: str) -> dict[str, Kind]:
    return {code.replace("_", "-"): Kind(severity, text) for code, text in says.items()}


KINDS: dict[str, Kind] = {
    **_kinds(
        Severity.ERROR,
        fused_shards_differ="linears that runtimes fuse have two schemes: vLLM takes the first shard's for all",
        fused_name_matched="an expression takes the name of a fused module (`.*up_proj$` takes `gate_up_proj`)",
        targets_overlap="targets of two groups take one layer, and loaders choose differently",
        not_compressed="`quantization_status` is not `compressed`: Transformers loads random weights",
        group_format_missing="a group without a format of its own, under `mixed-precision` or none: vLLM raises",
        head_by_class="a class as target takes `lm_head`, whose weights are dense: Transformers computes NaN",
        experts_differ="experts that a loader cannot give the schemes they are stored in",
        class_before_shards="SGLang looks at classes before the shards of fused modules",
        target_missing="no target takes a linear and no `ignore` names it: SGLang raises",
        ignore_differs="an `ignore` entry that loaders read differently (a class, a part of a name)",
        shards_ignored="`ignore` covers some shards of a fused module: vLLM and SGLang raise",
        loaders_disagree="two loaders give one layer different schemes",
        config_place="the config stands where Transformers does not look: in `compression_config`, in `text_config`",
        method_unread="`quant_method` is missing, or spelled as not all loaders read it",
        files_differ="`model.safetensors` beside an index of other files: loaders read different ones",
        file_stray="safetensors files beside `model.safetensors` without an index: vLLM loads them all",
        prefix_differs="tensors with a prefix of names that Transformers adds or drops, and vLLM does not",
        cache_scale_form="a scale of the KV cache of another shape or dtype than its strategy has",
        groups_empty="`config_groups` is empty: Transformers raises",
        tied_quantized="a layer is stored quantized, and the config ties its weight to another: Transformers raises",
        group_disagrees="a layer is in one group, and its tensors are those of another",
        layer_unknown="tensors of a layer or expert beyond those that config.json counts",
        model_invalid="Transformers refuses what config.json says of the model",
        group_invalid="a group that a loader refuses: unknown keys, impossible values",
        target_invalid="a target that is no regular expression",
        cache_invalid="`kv_cache_scheme` is not what loaders take: FP8, static, per tensor or head",
        cache_scale_missing="the KV cache is quantized, and a scale of it is missing",
        format_unread="vLLM has no class for this scheme in this format",
        format_disagrees="`format` names another layout than the tensors have",
        scale_dtype_missing="MX or NVFP4 scales without `scale_dtype`: they are read as other numbers",
        stored_quantized="a layer is stored quantized, and the config says dense",
        stored_dense="a layer is stored dense, and the config says quantized",
        tensor_missing="a tensor that a loader needs is not there",
        tensor_unexpected="a quantized layer has a tensor that its scheme does not have",
        zero_point_unexpected="a symmetric layer has zero points: vLLM refuses them",
        order_tensor="`weight_g_idx`: activation ordering that loaders no longer read",
        tensor_dtype="a tensor of another dtype than loaders expect",
        tensor_shape="a tensor of another shape than loaders expect",
        scale_one_dimensional="scales per channel of shape [O]; loaders want [O, 1]",
        words_padded="packed as before compressed-tensors 0.18, where values do not straddle words",
        weight_shape_wrong="`weight_shape` holds other sizes than the layer has",
        scale_not_finite="scales are NaN or infinite",
        scale_negative="NVFP4, global or activation scales are negative",
        global_scale_zero="a global or activation scale is zero: it is divided by",
        zero_point_range="zero points outside the range of their bits",
        global_scales_differ="NVFP4 shards that fuse have different global scales: vLLM takes the largest for all",
        input_scales_differ="static INT8 shards that fuse have different input scales: in vLLM the last one wins",
        illegal="the target cannot load this scheme here",
        unloadable="no hardware of this runtime loads this",
    ),
    **_kinds(
        Severity.WARNING,
        not_captured="the model's class is not captured: linears are guessed from tensor names",
        not_judged="a part of the config is not judged: transforms, output activations, unknown schemes",
        no_kernel="no target of this runtime has a kernel for the scheme",
        scale_zero="scales are zero: these groups of weights are read as zeros",
        weight_scale_negative="scales of weights are negative, which no writer gives",
        target_unmatched="a target matches nothing",
        tensor_unknown="a tensor that the model has no place for",
        tied_differ="the config ties two tensors that the files hold with other values: not all loaders untie them",
        global_scale_small="NVFP4 weights whose global scale looks like the reciprocal of what loaders divide by",
        global_scale_scalar="NVFP4 global scales of shape []: Transformers rounds what it divides by them to 16 bits",
        scale_dtype_absent="NVFP4 without `scale_dtype`: Transformers does not round the scales of activations",
    ),
    **_kinds(
        Severity.INFO,
        index_incomplete="the index lacks tensors that its files hold",
        target_repeated="one target stands in several groups: loaders take the last",
        ignore_unmatched="an `ignore` entry matches nothing",
        overlap_alike="targets of two groups take one layer, and all loaders choose alike",
        format_untidy="a format that loaders do not need, left out or of the other type of numbers",
        key_unknown="a key of `quantization_config` that loaders ignore",
    ),
}
"""Every code that a check can give."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or untidy. `message` says what will happen in `loaders`."""

    severity: Severity
    code: str
    layer: str
    loaders: tuple[str, ...]
    message: str
    mend: str

    @classmethod
    def of(cls, code: str, layer: str, loaders: Sequence[str], message: str, mend: str) -> Finding:
        """A finding as severe as its code."""
        return cls(KINDS[code].severity, code, layer, tuple(loaders), message, mend)

    def for_loader(self, loader: str | None) -> Finding:
        """An error in other loaders alone is a warning where only `loader` counts."""
        concerned = loader is None or any(name.split()[0] == loader for name in self.loaders)
        return self if concerned or self.severity is not Severity.ERROR else replace(self, severity=Severity.WARNING)


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What was checked: how many linears the checkpoint has and stores quantized, and every finding, errors first."""

    checkpoint: Path
    target: str | None
    linears: int
    quantized: int
    scales: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.of(Severity.ERROR)

    def of(self, severity: Severity) -> list[Finding]:
        """The findings of one severity."""
        return [finding for finding in self.findings if finding.severity is severity]

    def codes(self) -> Iterator[str]:
        """The codes of errors."""
        return (finding.code for finding in self.of(Severity.ERROR))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        fields = ("severity", "code", "layer", "loaders", "message", "mend")
        return {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": str(self.checkpoint),
            "target": self.target,
            "ok": self.ok,
            "linears": self.linears,
            "quantized": self.quantized,
            "scales": self.scales,
            "findings": [{name: getattr(finding, name) for name in fields} for finding in self.findings],
        }


def in_order(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors first, each severity in the order of the codes' table, then as found; the same finding once."""
    severities, codes = list(Severity), list(KINDS)
    rank = sorted(dict.fromkeys(findings), key=lambda f: (severities.index(f.severity), codes.index(f.code)))
    return tuple(rank)
