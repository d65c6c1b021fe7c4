"""The model that is compiled: its config, its modules on the meta device, and its weights, read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qcompiler.checkpoints.hub import resolve_model
from qcompiler.checkpoints.names import NameMap
from qcompiler.checkpoints.reader import CheckpointReader
from qcompiler.errors import CaptureError, CheckpointError, ConfigError, did_you_mean

OLDEST_TRANSFORMERS = "5.16"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(eq=False)
class ModelSource:
    """A causal language model in a local folder. `model` lies on the meta device; `names` opens the weight files."""

    folder: Path
    config: Any
    model: PreTrainedModel
    trust_remote_code: bool = False
    open_weights: Callable[[Path], CheckpointReader] = CheckpointReader.open

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that weights are computed and scales are written in."""
        return self.model.dtype

    @property
    def window(self) -> int | None:
        """How many positions the model was made for, where its config says so."""
        window = getattr(self.config, "max_position_embeddings", None)
        return int(window) if window else None

    @property
    def head_size(self) -> int | None:
        """Elements per attention head, where the config says so."""
        declared = getattr(self.config, "head_dim", None)
        heads = getattr(self.config, "num_attention_heads", None)
        width = getattr(self.config, "hidden_size", None)
        return int(declared) if declared else int(width) // int(heads) if heads and width else None

    @cached_property
    def reader(self) -> CheckpointReader:
        """The weight files, their headers checked. Raises `CheckpointError`."""
        return self.open_weights(self.folder)

    @cached_property
    def names(self) -> NameMap:
        """Paths of the model against keys of the checkpoint. Raises `CheckpointError` where they do not agree."""
        return NameMap.build(self.model, self.reader)

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds any weight file: a plan needs none."""
        return any(self.folder.glob("*.safetensors*")) or any(self.folder.glob("*.bin*"))

    def load(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and persistent buffers by path, on the CPU, in the model's dtype."""
        return self.names.load_many(paths)

    def close(self) -> None:
        """Close the weight files."""
        if "reader" in self.__dict__:
            self.reader.close()


def open_model(
    model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, dtype: str = "auto"
) -> ModelSource:
    """Find a model (local folder or hub id) and build it on the meta device. No weight is read.

    Raises `CaptureError` for what is no causal language model of the installed Transformers, `ConfigError` for a wrong
    dtype, `CheckpointError` for a folder that is none.
    """
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise CaptureError(
            f"Transformers {transformers.__version__} is too old to capture models from",
            hint=f"install transformers>={OLDEST_TRANSFORMERS}",
        )
    folder = resolve_model(str(model), revision=revision)
    config = _config(folder, trust_remote_code)
    refuse(config)
    built = build_on_meta(config, dtype=_dtype(dtype, config, folder), trust_remote_code=trust_remote_code)
    return ModelSource(folder, config, built, trust_remote_code)


def _config(folder: Path, trust_remote_code: bool) -> Any:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no config.json", hint="MODEL is a folder as save_pretrained writes it")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    if "auto_map" in raw and not trust_remote_code and raw.get("model_type") not in transformers.CONFIG_MAPPING:
        raise CaptureError(
            f"{folder} brings its own modeling code, which is not run unasked",
            hint="read that code, then pass --trust-remote-code (Python: trust_remote_code=True)",
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config can fail in as many ways as there are models
        kind = raw.get("model_type")
        near = did_you_mean(str(kind), transformers.CONFIG_MAPPING.keys())
        unknown = kind not in transformers.CONFIG_MAPPING
        what = (
            f"model_type {kind!r} is not known to Transformers {transformers.__version__}{near}" if unknown else error
        )
        raise CaptureError(f"{file}: {what}", hint="a newer Transformers may know it") from error


def refuse(config: Any) -> None:
    """Raise `CaptureError` for models that are no dense causal decoder: what they are, and why that is refused."""
    name = config.model_type
    if getattr(config, "quantization_config", None) is not None:
        raise CaptureError(
            f"{name}: this model is already quantized", hint="compile the original, unquantized checkpoint"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(f"{name} is an encoder-decoder; only decoders are compiled")
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(config, "auto_map", None):
        raise CaptureError(f"{name} has no causal language model in Transformers {transformers.__version__}")
    parts = [
        key for key in ("vision_config", "audio_config", "speech_config") if getattr(config, key, None) is not None
    ]
    if parts or (config.get_text_config() is not config):
        raise CaptureError(
            f"{name} is multimodal ({', '.join(parts) or 'it nests a text_config'}); only text decoders are compiled",
            hint="save the language model alone and compile that",
        )


def _dtype(name: str, config: Any, folder: Path) -> torch.dtype:
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"unknown dtype {name!r}{did_you_mean(name, DTYPES)}", hint=f"auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    declared = getattr(config, "dtype", None)
    if isinstance(declared, str):
        declared = DTYPES.get(declared)
    if isinstance(declared, torch.dtype):
        return declared
    if not any(folder.glob("*.safetensors*")):
        return torch.float32
    with CheckpointReader.open(folder) as reader:
        return next((meta.dtype for meta in reader.tensors.values() if meta.dtype.is_floating_point), torch.float32)


def build_on_meta(config: Any, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, in eval mode on the meta device. Raises `CaptureError`."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise CaptureError(f"{config.model_type}: the model cannot be built from its config: {error}") from error
    model.eval()
    return model
