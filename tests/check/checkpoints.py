"""Checkpoints that are broken on purpose: one is read once, edited in memory, and written to a folder of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors.torch import save_file
from torch import Tensor

from tests.compile.tiny import model_config, stored

LAYER = "model.layers.0"
QUERY, KEY, VALUE, OUTPUT = (f"{LAYER}.self_attn.{leaf}_proj" for leaf in "qkvo")
GATE, UP, DOWN = (f"{LAYER}.mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))
QKV, GATE_UP = f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.gate_up_proj"


@dataclass
class Edited:
    """A checkpoint in memory: its config.json and its tensors, by their names on disk; files and index beside it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    index: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls(model_config(folder), stored(folder))

    def copy(self) -> Self:
        return type(self)(copy.deepcopy(self.config), dict(self.tensors))

    @property
    def quantization(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    @property
    def groups(self) -> dict[str, Any]:
        found: dict[str, Any] = self.quantization["config_groups"]
        return found

    def group(self, name: str = "group_0") -> dict[str, Any]:
        found: dict[str, Any] = self.groups[name]
        return found

    def split(self, *targets: str, **weights: Any) -> dict[str, Any]:
        """A second group of the same content for these targets; `weights`: what it says differently."""
        self.groups["group_1"] = second = copy.deepcopy(self.group())
        second["targets"] = list(targets)
        second["weights"] |= weights
        return second

    def change(self, key: str, change: Callable[[Tensor], Tensor]) -> None:
        self.tensors[key] = change(self.tensors[key].clone()).contiguous()

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        save_file(self.tensors, folder / "model.safetensors")
        for name, tensors in self.files.items():
            save_file(tensors, folder / name)
        if self.index:
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": self.index}))
        return folder
