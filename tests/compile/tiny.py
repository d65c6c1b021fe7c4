"""Tiny checkpoints to compile, pipelines of one rule or two, and compiled folders read without the compiler."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from passes.assign import Assign
from passes.calibrate import Calibrate
from passes.insert_observers import InsertObservers
from passes.legalize import Legalize
from passes.lower import Lower
from qcompiler import CalibrationSpec, Pipeline, Result, compile, load_pipeline
from qcompiler.capture.twin import build_twin
from tests.zoo import tiny_config

ATTENTION = {"structure": ["attention-input", "attention-output"]}
MLP = {"structure": ["mlp-input", "mlp-output"]}
EVERYWHERE = {"structure": [*ATTENTION["structure"], *MLP["structure"]]}

INT4 = {"weights": {"type": "int", "bits": 4, "group_size": 16}}
INT4_ASYM = {"weights": {"type": "int", "bits": 4, "group_size": 16, "symmetric": False}}
INT8 = {"weights": {"type": "int", "bits": 8, "group_size": 16}}
INT8_STATIC = {
    "weights": {"type": "int", "bits": 8, "strategy": "channel"},
    "input_activations": {"type": "int", "bits": 8, "strategy": "tensor"},
}

SHORT = CalibrationSpec(sequence_length=32)
"""How rows of 32 tokens are sampled."""


def tiny_model(
    model_type: str, *, layers: int | None = None, dtype: torch.dtype = torch.bfloat16, **said: Any
) -> PreTrainedModel:
    """A tiny random model, the same at every call; `said` is what its config says differently."""
    config = tiny_config(model_type, layers=layers)
    for name, value in said.items():
        setattr(config, name, value)
    return build_twin(config, layers=layers, dtype=dtype)


def save_tiny(folder: Path, model_type: str, **said: Any) -> Path:
    """The checkpoint of a tiny random model as Transformers writes it."""
    tiny_model(model_type, **said).save_pretrained(folder)
    return folder


def token_rows(count: int = 8, length: int = 32, *, vocabulary: int = 320, seed: int = 0) -> list[dict[str, list[int]]]:
    """Calibration rows of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, vocabulary, (length,), generator=generator).tolist()} for _ in range(count)]


def rule(select: Mapping[str, Any], scheme: str | Mapping[str, Any] | None, **options: Any) -> dict[str, Any]:
    return {"select": select, "scheme": scheme, **options}


def pipeline(
    *rules: Mapping[str, Any],
    ignore: Sequence[Mapping[str, Any]] = (),
    target: str = "transformers",
    legalize: Mapping[str, Any] | None = None,
    observers: Mapping[str, Any] | None = None,
    scales: Any = "minmax",
    runs: Sequence[Mapping[str, Any]] = ({},),
    **assign: Any,
) -> Pipeline:
    """A whole pipeline; its rules are written as in YAML. `runs`: what each calibrate says besides `scales`."""
    return load_pipeline(
        [
            Assign(rules=rules, ignore=ignore, **assign),  # type: ignore[arg-type]
            Legalize(target=target, **(legalize or {})),
            InsertObservers(**(observers or {})),
            *(Calibrate(scales=scales, **run) for run in runs),
            Lower(),
        ]
    )


def compile_tiny(source: Path, output: Path, chosen: Pipeline, *, rows: int = 8, **options: Any) -> Result:
    """Compile a tiny model; `rows` of random tokens are there for what measures activations."""
    return compile(source, pipeline=chosen, output=output, calibration=token_rows(rows), sampling=SHORT, **options)


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its name on disk."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  it is no mapping
    return tensors


def model_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def quantization(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = model_config(folder)["quantization_config"]
    return config


def provenance(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "qcompiler.json").read_text())
    return data


def restamp(folder: Path) -> Path:
    """Make qcompiler.json say that the files were written as they are now: what is looked at beyond their bytes?"""
    data = provenance(folder)
    data["files"] = {
        name: {
            "size": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in data["files"]
        if (folder / name).exists()
    }
    (folder / "qcompiler.json").write_text(json.dumps(data))
    return folder


def timeless(file: Path) -> bytes:
    """A file of a checkpoint without what differs between equal runs: how long they took."""
    if file.name != "qcompiler.json":
        return file.read_bytes()
    data = json.loads(file.read_text())
    assert data.pop("timings")
    return json.dumps(data).encode()


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def weight_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors*")}
