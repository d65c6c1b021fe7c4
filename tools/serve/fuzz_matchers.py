"""Hold `qcompiler.emit.matchers` to the loaders' own functions, on random names, targets, ignores and fused maps.

Runs inside the serving environment (vLLM and compressed-tensors installed, qcompiler on PYTHONPATH). SGLang itself
needs a GPU stack, so its matching functions are taken out of its wheels: `--sglang WHEEL` for each release.
Exit status 1 at the first difference, with the seed and the case.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.utils import match
from transformers.integrations.compressed_tensors import get_experts_scheme
from vllm.model_executor.layers.quantization.compressed_tensors import utils as vllm_utils  # type: ignore[import-not-found,unused-ignore]
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # type: ignore[import-not-found,unused-ignore]
    CompressedTensorsConfig,
)

from qcompiler.emit import matchers
from qcompiler.emit.config import build_quantization_config
from qcompiler.emit.patterns import TargetList
from qcompiler.emit.sites import RuntimeModule, Site, runtime_modules
from qcompiler.scheme import PRESETS, KVCacheSpec

FUSED = {"qkv_proj": [["q_proj", "k_proj", "v_proj"]], "gate_up_proj": [["gate_proj", "up_proj"]]}
SHARDS = {name: expansions[0] for name, expansions in FUSED.items()}
LEAVES = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "gate",
]
CLASSES = ["Linear", "RowParallelLinear", "QKVParallelLinear", "ParallelLMHead", "RoutedExperts", "Module", "linear"]
EXPERT_LEAVES = ["gate_proj", "up_proj", "down_proj"]
SGLANG_UTILS = "sglang/srt/layers/quantization/compressed_tensors/utils.py"

Case = tuple[str, Callable[[], object], Callable[[], object]]


def random_name(rng: random.Random) -> str:
    if rng.random() < 0.08:
        return rng.choice(["lm_head", "model.lm_head", "q_proj"])
    layer, leaf = rng.choice(["0", "1", "10", "11"]), rng.choice(LEAVES)
    block = rng.choice(["self_attn", "mlp", "mlp.experts.0", "mlp.experts.10", "mlp.shared_expert"])
    return f"{rng.choice(['model', 'model.language_model'])}.layers.{layer}.{block}.{leaf}"


def random_target(rng: random.Random) -> str:
    name, leaf = random_name(rng), rng.choice(LEAVES)
    regexes = [
        rf"re:.*{leaf}$",
        rf"re:.*\.{leaf}$",
        rf"re:.*{leaf}",
        rf"re:{leaf}",
        r"re:model\.layers\.(0|1)\..*",
        "re:.*",
    ]
    regexes += [rf"re:.*\.layers\.(?:0|10)\.self_attn\.{leaf}$", r"re:.*experts.*", r"re:.*Linear", r"re:.*(k|v)_proj"]
    plain = [name, name, name.rpartition(".")[0], name.partition(".")[2], leaf, rng.choice(CLASSES)]
    return rng.choice(regexes if rng.random() < 0.5 else plain)


def random_targets(rng: random.Random, most: int) -> list[str]:
    return list(dict.fromkeys(random_target(rng) for _ in range(rng.randrange(most))))


def outcome(call: Callable[[], object]) -> object:
    """The call's value, or that it raised what a loader raises."""
    try:
        return call()
    except (ValueError, matchers.LoaderError):
        return "raises"


def instance_of(class_name: str) -> torch.nn.Module:
    if class_name == "Linear":
        return torch.nn.Linear(1, 1, device="meta")
    return torch.nn.Module() if class_name == "Module" else type(class_name, (torch.nn.Module,), {})()


def function_cases(rng: random.Random, sglang: dict[matchers.IgnoreRule, ModuleType]) -> Iterator[Case]:
    """One random case for each loader's target lookup and ignore rule."""
    name, class_name = random_name(rng), rng.choice(CLASSES)
    targets, ignore = random_targets(rng, 6), random_targets(rng, 4)
    shards = {key: SHARDS[key] for key in SHARDS if rng.random() < 0.7}
    module = instance_of(class_name)
    classes = [cls.__name__ for cls in type(module).__mro__]
    yield (
        f"vLLM target of {name} ({class_name}), targets {targets}, fused {shards}",
        lambda: vllm_utils.find_matched_target(name, module, targets, shards),
        lambda: matchers.vllm_matched_target(name, class_name, TargetList(targets, "regex"), shards),
    )
    yield (
        f"vLLM ignore of {name}, ignore {ignore}, fused {shards}",
        lambda: vllm_utils.should_ignore_layer(name, ignore, shards),
        lambda: matchers.vllm_ignores(name, TargetList(ignore, "regex"), shards),
    )
    yield (
        f"compressed-tensors target of {name} ({class_name}), targets {targets}",
        lambda: next(iter(match.match_targets(name, module, targets)), None),
        lambda: matchers.transformers_matched_target(name, classes, matchers.transformers_order(targets)),
    )
    yield (
        f"compressed-tensors ignore of {name} ({class_name}), ignore {ignore}",
        lambda: match.is_match(name, module, ignore),
        lambda: matchers.transformers_ignores(name, classes, TargetList(ignore, "re")),
    )
    for rule, utils in sglang.items():
        yield (
            f"SGLang target of {name} ({class_name}), targets {targets}, fused {shards}",
            partial(utils.find_matched_target, name, module, targets, shards),
            lambda: matchers.sglang_matched_target(name, class_name, TargetList(targets, "re"), shards),
        )
        yield (
            f"SGLang ({rule}) ignore of {name}, ignore {ignore}, fused {shards}",
            partial(utils.should_ignore_layer, name, ignore, shards),
            partial(matchers.sglang_ignores, name, TargetList(ignore, "re"), shards, rule),
        )


def random_config(rng: random.Random) -> dict[str, Any]:
    groups = {
        f"group_{i}": {
            "targets": random_targets(rng, 4) or ["Linear"],
            "weights": {"num_bits": bits, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for i, bits in enumerate(rng.sample([3, 4, 8], rng.randrange(1, 4)))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": random_targets(rng, 3),
    }


def random_model(rng: random.Random) -> list[Site]:
    names = {name for _ in range(12) if "experts" not in (name := random_name(rng))}
    names |= {f"{n.rpartition('.')[0]}.{leaf}" for n in names if n.endswith(".q_proj") for leaf in ("k_proj", "v_proj")}
    names = {n for n in names if not any(other.startswith(f"{n}.") for other in names)}
    sites = [Site(name, out_features=8, in_features=8) for name in sorted(names)]
    for layer in rng.sample(["0", "1", "10", "11"], 2):
        experts = f"model.layers.{layer}.mlp.experts"
        sites += [
            Site(f"{experts}.{expert}.{leaf}", out_features=8, in_features=8, kind="experts")
            for expert in range(2)
            for leaf in EXPERT_LEAVES
        ]
    return sites


def bits_by_group(config: dict[str, Any]) -> dict[str | None, int | None]:
    return {None: None} | {name: group["weights"]["num_bits"] for name, group in config["config_groups"].items()}


def vllm_bits(config: CompressedTensorsConfig, module: RuntimeModule) -> int | None:
    """The bits that vLLM gives a module; for experts as `CompressedTensorsMoEMethod.get_moe_method` asks for them."""
    if not module.is_expert_block:
        scheme = config.get_scheme_dict(instance_of(matchers.vllm_class(module)), module.name)
        return None if scheme is None else scheme["weights"].num_bits
    config._add_fused_moe_to_target_scheme_map()
    experts = instance_of("RoutedExperts")
    schemes = [config.get_scheme_dict(experts, f"{module.name}.0.{leaf}") for leaf in EXPERT_LEAVES]
    if any(scheme != schemes[0] for scheme in schemes):
        raise ValueError("All MoE projections need to have same quantization scheme but found multiple")
    return None if schemes[0] is None else schemes[0]["weights"].num_bits


def config_cases(rng: random.Random) -> Iterator[Case]:
    """One random config over one random model: the loaders' own config classes against `assignment`."""
    config, sites = random_config(rng), random_model(rng)
    bits = bits_by_group(config)
    ours = {loader: matchers.assignment(loader, config, sites, FUSED) for loader in ("vllm", "transformers")}

    theirs = CompressedTensorsConfig.from_config(config)
    modules = runtime_modules(sites, FUSED)
    theirs.packed_modules_mapping = {m.name.rpartition(".")[2]: list(m.shards) for m in modules if m.shards}
    for resolution in ours["vllm"].resolutions:
        if not matchers.is_lm_head(resolution.module):  # its error becomes "dense" one level up, in get_quant_method
            yield (
                f"vLLM config for {resolution.module.name}: {config}",
                partial(vllm_bits, theirs, resolution.module),
                partial(str, "raises") if resolution.error else partial(bits.get, resolution.group),
            )
    yield (
        f"Transformers experts: {config}",
        lambda: get_experts_scheme(QuantizationConfig.model_validate(config)).weights.num_bits,
        lambda: bits[matchers.transformers_experts_group(config)],
    )

    model = torch.nn.Module()
    for site in (site for site in sites if site.kind == "linear"):  # experts are no modules in Transformers 5
        parent = model
        for part in site.name.split(".")[:-1]:
            if part not in dict(parent.named_children()):
                parent.add_module(part, torch.nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(site.leaf, torch.nn.Linear(8, 8, device="meta"))
    try:
        apply_quantization_config(model, QuantizationConfig.model_validate(config))
    except ValueError:
        return  # releases before 0.18 refuse a target that takes a container of linears
    for name, group in ours["transformers"].groups.items():
        if ".experts." in name:
            continue
        scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
        yield (
            f"Transformers config for {name}: {config}",
            partial(getattr, getattr(scheme, "weights", None), "num_bits", None),
            partial(bits.get, group),
        )


def preset_cases() -> Iterator[Case]:
    """The config that is emitted for each preset, as the library and vLLM parse it."""
    for name, scheme in PRESETS.items():
        sites = [Site(f"model.layers.0.mlp.{leaf}", 256, 256, scheme) for leaf in ("gate_proj", "up_proj", "down_proj")]
        config = build_quantization_config(sites, kv_cache=KVCacheSpec()).config
        meant = (scheme.weights.bits, scheme.weights.type, str(scheme.weights.strategy), str(scheme.format))

        def parsed(config: dict[str, Any] = config) -> object:
            (group,) = QuantizationConfig.model_validate(config).config_groups.values()
            CompressedTensorsConfig.from_config(config)
            weights = group.weights
            return (
                weights.num_bits,
                str(weights.type),
                str(weights.strategy),
                str(CompressionFormat(group.format).value),
            )

        yield f"preset {name}: {config}", parsed, partial(tuple, meant)


def sglang_utils(wheel: Path) -> tuple[matchers.IgnoreRule, ModuleType]:
    """A release's matching functions, and which `ignore` rule it has, read off its source."""
    with zipfile.ZipFile(wheel) as archive:
        source = archive.read(SGLANG_UTILS).decode()
    module = ModuleType(f"sglang_utils_{wheel.stem}")
    exec(compile(source, f"{wheel}/{SGLANG_UTILS}", "exec"), module.__dict__)
    return ("suffix" if 'endswith("." + target)' in source else "substring"), module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=5000, help="random cases for each function")
    parser.add_argument("--configs", type=int, default=300, help="random whole configs")
    parser.add_argument("--sglang", type=Path, nargs="*", default=[], metavar="WHEEL")
    arguments = parser.parse_args()
    sglang = dict(sglang_utils(wheel) for wheel in arguments.sglang)
    logging.disable(logging.WARNING)  # targets that match nothing are half of the cases
    rng = random.Random(arguments.seed)
    compared = 0
    functions = (case for _ in range(arguments.cases) for case in function_cases(rng, sglang))
    configs = (case for _ in range(arguments.configs) for case in config_cases(rng))
    for what, theirs, ours in chain(preset_cases(), functions, configs):
        expected, found = outcome(theirs), outcome(ours)
        compared += 1
        if expected != found:
            print(f"seed {arguments.seed}: {what}\n  the loader says {expected!r}, matchers say {found!r}")
            return 1
    print(
        f"seed {arguments.seed}: {compared} cases agree with vLLM, compressed-tensors {compressed_tensors.__version__}"
        + "".join(f", SGLang ({rule})" for rule in sglang)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
