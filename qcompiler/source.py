"""The model that is compiled: its config, its modules on the meta device, and its weights, read when asked for."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Self, TypeAlias

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from qcompiler.arguments import check_type
from qcompiler.checkpoints.companions import copy_companions
from qcompiler.checkpoints.finite import FiniteTensor, check_finite, place
from qcompiler.checkpoints.hub import resolve_model
from qcompiler.checkpoints.memory import LoadedTensors
from qcompiler.checkpoints.names import NameMap
from qcompiler.checkpoints.quantized import is_dense, refuse_described
from qcompiler.checkpoints.reader import CheckpointReader, RawTensor, TensorSource, fingerprint, holds_weights
from qcompiler.checkpoints.writer import DiskTensor
from qcompiler.collector import collector_paused
from qcompiler.errors import CaptureError, CheckpointError, ConfigError, ModelConfigError, did_you_mean
from qcompiler.limits import check_config_size, check_layers
from qcompiler.meta import build_on_meta
from qcompiler.refuse import refuse, refuse_built

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

TokenizerLike: TypeAlias = PreTrainedTokenizerBase | str | Path


@dataclass(eq=False)
class ModelSource:
    """A causal language model: `model` lies on the meta device, `names` opens the weights when they are first needed.

    `folder` holds config, tokenizer and other small files. For a model that was handed over loaded it is a temporary
    one, deleted by `close`, and `loaded` has the weights. Close it, or use it as a context
    manager. Without `reads_weights`, tied weights that the files hold twice are not compared.
    """

    folder: Path
    config: Any
    model: PreTrainedModel
    trust_remote_code: bool = False
    open_weights: Callable[[Path], TensorSource] = CheckpointReader.open
    loaded: PreTrainedModel | None = None
    staging: TemporaryDirectory[str] | None = None
    reads_weights: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that weights are computed and scales are written in."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def window(self) -> int | None:
        """How many positions the model was made for, where its config says so."""
        window = getattr(self.config, "max_position_embeddings", None)
        return int(window) if window else None

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Elements per attention head, of all layers, where the config says so."""
        by_layer = getattr(self.config, "per_layer_config", None) or [self.config]
        return tuple(sorted({size for config in by_layer if (size := _head_size(config)) is not None}))

    @cached_property
    def reader(self) -> TensorSource:
        """The weights: files with their headers checked, or those in memory. Raises `CheckpointError`."""
        return LoadedTensors(self.loaded) if self.loaded is not None else self.open_weights(self.folder)

    @cached_property
    def names(self) -> NameMap:
        """Paths of the model against keys of the checkpoint. Raises `CheckpointError` where they do not agree."""
        if self.loaded is None:
            return NameMap.build(self.model, self.reader, compare=self.reads_weights)
        return NameMap.of_loaded(self.model, self.reader, getattr(self.loaded, "_weight_conversions", None))

    @cached_property
    def has_weights(self) -> bool:
        """Whether there is any weight: a plan needs none."""
        return self.loaded is not None or holds_weights(self.folder)

    def check_weights(self) -> None:
        """Read the headers of the weight files, and find every parameter in them: quick, where capture is not.

        Raises `CheckpointError` for files that are missing or damaged, or that hold another or a quantized model.
        """
        _ = self.names

    def load(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """Parameters and persistent buffers by path, in the model's dtype.

        They lie on the CPU, or where a loaded model has them. Raises `CheckpointError` for a parameter with NaN or
        infinite values: whatever is compiled from it would be broken, and no statistic would be right.
        """
        values = self.names.load_many(paths)
        for path, value in values.items():
            if path in self._parameters:
                check_finite(path, value, place(self.names.sources(path)[0]))
        return values

    def dense(
        self, paths: Iterable[str], replaced: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, DiskTensor]:
        """What to write for parameters and buffers that stay dense, by key; see `NameMap.dense`.

        Raises `CheckpointError` as `load` does: here for what is loaded or replaced, and while it is copied for the
        rest.
        """
        paths = list(paths)
        written: dict[str, DiskTensor] = dict(self.names.dense(p for p in paths if p not in self._parameters))
        for key, tensor in self.names.dense((p for p in paths if p in self._parameters), replaced).items():
            if isinstance(tensor, RawTensor):
                written[key] = FiniteTensor(tensor.reader, tensor.key)
            else:
                check_finite(key, tensor, self.reader.origin)
                written[key] = tensor
        return written

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.model.named_parameters(remove_duplicate=False))

    def identity(self) -> dict[str, str]:
        """What the model is, whatever its folder is called: hashes of its config and of its weights."""
        config = (self.folder / "config.json").read_bytes()
        return {"config": hashlib.sha256(config).hexdigest(), "weights": fingerprint(self.reader)}

    def close(self) -> None:
        """Close the weight files, and delete the temporary folder of a loaded model."""
        if "reader" in self.__dict__:
            self.reader.close()
        if self.staging is not None:
            self.staging.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _head_size(config: Any) -> int | None:
    try:
        declared = getattr(config, "head_dim", None)
        heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    except RuntimeError:  # a value that differs between layers, which this config does not list
        return None
    return int(declared) if declared else int(width) // int(heads) if heads and width else None


@collector_paused()
def open_model(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: TokenizerLike | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype = "auto",
    reads_weights: bool = True,
) -> ModelSource:
    """Find a model (local folder, hub id, or loaded) and build it on the meta device. No weight is read.

    tokenizer: of a loaded model, as an object or a folder; a folder brings its own. A loaded model is only read: it is
    neither run nor changed. Raises `CaptureError` for what is no causal language model of the installed Transformers,
    `ConfigError` for a wrong dtype or tokenizer, `CheckpointError` for a folder that is none or is quantized already.
    """
    dtype = _dtype_name(dtype)
    if not isinstance(model, (str, Path)):
        return _open_loaded(model, tokenizer, dtype)
    if tokenizer is not None:
        raise ConfigError(f"{model} is a folder, which brings its own tokenizer", hint="leave tokenizer= out")
    folder = resolve_model(str(model), revision=revision)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    try:
        refuse(config)
    except CaptureError as error:
        raise CaptureError(f"{model}: {error.message}", hint=error.hint) from None
    refuse_described(folder)
    built = build_on_meta(config, dtype=_dtype(dtype, config, folder), trust_remote_code=trust_remote_code)
    refuse_built(built)
    return ModelSource(folder, config, built, trust_remote_code, reads_weights=reads_weights)


def _open_loaded(model: Any, tokenizer: TokenizerLike | None, dtype: str) -> ModelSource:
    """A source over a loaded model. What `save_pretrained` writes besides weights goes to a temporary folder."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"a {name} cannot be compiled", hint="give a folder, a hub id or a loaded transformers.PreTrainedModel"
        )
    if model.is_remote_code():
        raise CaptureError(
            f"the loaded {name} is defined by code outside Transformers",
            hint="save it with save_pretrained, and compile the folder with trust_remote_code=True",
        )
    staging = TemporaryDirectory(prefix="qcompiler-model-")
    try:
        folder = Path(staging.name)
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = _short(model.dtype), [name]
        config.save_pretrained(folder)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        _stage_tokenizer(tokenizer, folder)
        config = read_config(folder)
        refuse(config)
        built = build_on_meta(config, dtype=model.dtype if dtype == "auto" else DTYPES[dtype])
        if type(built) is not type(model):
            raise CaptureError(
                f"the loaded {name} would be served as {type(built).__name__}, as its config says",
                hint=f"load it as transformers.AutoModelForCausalLM: that gives a {type(built).__name__}",
            )
        refuse_built(built)
        return ModelSource(folder, config, built, loaded=model, staging=staging)
    except BaseException:
        staging.cleanup()
        raise


def _stage_tokenizer(tokenizer: TokenizerLike | None, folder: Path) -> None:
    if isinstance(tokenizer, (str, Path)):
        if not Path(tokenizer).is_dir():
            raise ConfigError(
                f"tokenizer={str(tokenizer)!r}: there is no such folder", hint="give a folder or an object"
            )
        copy_companions(Path(tokenizer), folder, without=("generation_config.json",))
    elif tokenizer is not None:
        check_type("tokenizer", tokenizer, PreTrainedTokenizerBase, "a folder, or what AutoTokenizer loads")
        tokenizer.save_pretrained(folder)


def read_config_json(folder: Path) -> dict[str, Any]:
    """What config.json of a model folder says, as it stands.

    Raises `CheckpointError` where it is none, `SizeError` where it is too long.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no config.json", hint="give a folder as save_pretrained writes it")
    check_config_size(file)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not JSON: {type(error).__name__}: {str(error)[:200]}", hint="download the file again"
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds a {type(raw).__name__}, not a JSON object", hint="download the file again")
    return raw


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The config of a model folder, as Transformers understands it.

    Raises `CheckpointError` where there is none, and `CaptureError` where Transformers cannot load it or would have to
    run code that nobody trusted; `SizeError` where it counts too many layers.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder", hint="give a folder as save_pretrained writes it")
    file, raw = folder / "config.json", read_config_json(folder)
    check_layers(raw, file)
    kind = raw.get("model_type")
    known = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
    if "auto_map" in raw and not known and not trust_remote_code:
        raise CaptureError(
            f"{folder} brings its own modeling code, which is not run unasked",
            hint="read that code, then pass --trust-remote-code (Python: trust_remote_code=True)",
        )
    if not known and "auto_map" not in raw:
        near = did_you_mean(kind, transformers.CONFIG_MAPPING.keys()) if isinstance(kind, str) else ""
        raise CaptureError(
            f"{file}: model_type {kind!r} is not known to Transformers {transformers.__version__}{near}",
            hint="correct config.json, or install a newer Transformers that knows it",
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config can fail in as many ways as there are models
        raise ModelConfigError(
            f"{file} is no valid {kind} config: {type(error).__name__}: {error}",
            hint="correct config.json: Transformers itself does not load it",
        ) from error
    return config


def _dtype_name(dtype: object) -> str:
    """`auto` or a name of `DTYPES`. Raises `ConfigError` for what is neither, nor such a `torch.dtype`."""
    name = _short(dtype) if isinstance(dtype, torch.dtype) else dtype
    if isinstance(name, str) and (name == "auto" or name in DTYPES):
        return name
    near = did_you_mean(name, DTYPES) if isinstance(name, str) else ""
    raise ConfigError(f"unknown dtype {name!r}{near}", hint=f"auto, {', '.join(DTYPES)}, or the torch.dtype")


def _dtype(name: str, config: Any, folder: Path) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    declared = getattr(config, "dtype", None)
    if isinstance(declared, str):
        declared = DTYPES.get(declared)
    if isinstance(declared, torch.dtype):
        return declared
    if not holds_weights(folder):
        return torch.float32
    with CheckpointReader.open(folder) as reader:
        return next((meta.dtype for meta in reader.tensors.values() if is_dense(meta.dtype)), torch.float32)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
