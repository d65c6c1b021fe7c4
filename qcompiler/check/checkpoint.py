"""A compressed-tensors checkpoint as a check reads it: config and headers at once, values in small parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from qcompiler.checkpoints.header import TensorMeta, check_values
from qcompiler.checkpoints.reader import CheckpointReader
from qcompiler.emit.schema import QUANT_METHOD
from qcompiler.errors import CheckpointError, ConfigError
from qcompiler.expressions import REGEX_PREFIX, compile_together
from qcompiler.limits import LAYERS, MOST_LAYERS, MOST_MODULES, check_config_size
from qcompiler.source import read_config_json

_MAX_EXPERTS = 4096  # that a config may claim, whatever the files hold
_MAX_SIZE = 1 << 20  # of a dimension, whatever the files hold: tables of that many entries are made in no time
_MAX_GROUPS = 10_000
_MAX_EXPRESSIONS = 4096  # regular expressions, and a MiB of them; compiling them takes seconds
_EXPERTS = re.compile(r"(num|n)_.*experts")
_SIZES = re.compile(r"(.*_)?(size|dim)|n_(embd|inner)")
_CHUNK = 4 << 20  # bytes of a tensor that are in memory at once

PARTS = re.compile(
    r"weight(_packed|_scale|_zero_point|_shape|_global_scale|_g_idx)?|(input|output)_(scale|zero_point|global_scale)"
)
"""What compressed-tensors stores under a quantized module."""
PLACE = "quantization_config"
"""Where every loader finds a quantization in config.json."""
_MARKS = ("weight_packed", "weight_scale")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint. place: where in config.json the quantization stands. parts: the tensors of modules, by their
    names on disk, then by part.
    """

    folder: Path
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    place: str
    reader: CheckpointReader
    parts: Mapping[str, Mapping[str, TensorMeta]]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read config.json and every header.

        Raises `CheckpointError` where there is no compressed-tensors checkpoint, or its files are damaged or hostile.
        """
        config, quantization, place = _read_config(folder)
        reader = CheckpointReader.open(folder)
        try:
            _check_numbers(config, folder, reader.tensors)
            parts: dict[str, dict[str, TensorMeta]] = {}
            for key, meta in reader.tensors.items():
                module, _, part = key.rpartition(".")
                if PARTS.fullmatch(part):
                    parts.setdefault(module, {})[part] = meta
            if len(parts) > MOST_MODULES:
                raise CheckpointError(
                    f"{folder}: the files hold tensors of {len(parts)} modules; at most {MOST_MODULES} are judged",
                    hint="no open model has half as many: do not trust this checkpoint",
                )
            return cls(folder, config, quantization, place, reader, parts)
        except BaseException:
            reader.close()
            raise

    def is_quantized(self, module: str) -> bool:
        """Whether a module is stored with codes and scales."""
        return any(mark in self.parts.get(module, ()) for mark in _MARKS)

    def chunks(self, meta: TensorMeta) -> Iterator[Tensor]:
        """The values of a tensor, flat, a few MiB at a time."""
        step = _CHUNK - _CHUNK % meta.dtype.itemsize
        for start in range(0, meta.nbytes, step):
            data = self.reader.bytes_at(meta.key, start, step)
            if len(data) != min(step, meta.nbytes - start):
                raise CheckpointError(
                    f"{meta.file}: the file ended while tensor {meta.key!r} was read",
                    hint="do not write into a checkpoint while it is checked",
                )
            yield torch.frombuffer(bytearray(data), dtype=meta.dtype)

    def close(self) -> None:
        self.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """config.json, what it says of quantization, and where it says that."""
    file = folder / "config.json"
    check_config_size(file)
    if file.is_file() and file.stat().st_size:  # what has no size, such as a pipe, may never be read to its end
        check_values(file.read_bytes(), file)
    elif file.is_file():
        raise CheckpointError(f"{file} is not JSON: it is empty", hint="download the file again")
    config = read_config_json(folder)
    place, quantization = next(((place, at) for place, at in _places(config) if at is not None), (PLACE, None))
    hint = f"only {QUANT_METHOD} checkpoints are checked: compile one, or see llm-compressor"
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{file} has no quantization_config: this checkpoint is not quantized", hint=hint)
    method = quantization.get("quant_method", QUANT_METHOD)
    if not isinstance(method, str) or method.lower().replace("_", "-") != QUANT_METHOD:
        raise CheckpointError(f"{file} has quant_method {str(method)[:80]!r}", hint=hint)
    if _is_sparse(quantization.get("sparsity_config")):
        raise CheckpointError(
            f"{file} has a sparsity_config: sparse checkpoints are not read",
            hint="loaders have dropped them too: save the model again without sparse compression",
        )
    _check_form(quantization, file)
    return config, quantization, place


def _places(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Where vLLM looks for a quantization, in its order."""
    text = config.get("text_config")
    yield PLACE, config.get(PLACE)
    yield f"text_config.{PLACE}", text.get(PLACE) if isinstance(text, dict) else None
    yield "compression_config", config.get("compression_config")


def _is_sparse(written: Any) -> bool:
    """Whether weights are stored sparse. llm-compressor has long written the key for dense ones too."""
    return bool(written) and not (
        isinstance(written, dict) and written.get("format") in ("dense", None) and not written.get("targets")
    )


def _check_form(quantization: Mapping[str, Any], file: Path) -> None:
    """Raise `CheckpointError` where groups, targets or ignores are not even mappings and lists of text, or too many."""
    groups, ignore = quantization.get("config_groups"), quantization.get("ignore")
    targets = []
    if isinstance(groups, dict):
        targets = [group if isinstance(group, list) else _targets(group) for group in groups.values()]
    lists = [*targets, ignore if ignore is not None else []]
    if not isinstance(groups, dict) or not all(
        isinstance(entries, list) and all(isinstance(entry, str) for entry in entries) for entries in lists
    ):
        raise CheckpointError(
            f"{file}: quantization_config needs config_groups, a mapping, whose targets and whose ignore are lists of "
            "names",
            hint="no loader reads this: correct the file, or write the checkpoint again",
        )
    if len(groups) > _MAX_GROUPS:
        raise CheckpointError(
            f"{file}: {len(groups)} config_groups; at most {_MAX_GROUPS} are read", hint="do not trust this checkpoint"
        )
    expressions = [entry for entries in lists for entry in entries if entry.startswith(REGEX_PREFIX)]
    if len(expressions) > _MAX_EXPRESSIONS or sum(map(len, expressions)) > 1 << 20:
        raise CheckpointError(
            f"{file}: {len(expressions)} regular expressions; at most {_MAX_EXPRESSIONS} are read, and a MiB of them",
            hint="do not trust this checkpoint, or name the linears exactly",
        )
    try:
        compile_together(expressions)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error.message}", hint=error.hint) from error


def _targets(group: object) -> object:
    return group.get("targets") if isinstance(group, dict) else None


def _check_numbers(config: Mapping[str, Any], folder: Path, tensors: Mapping[str, TensorMeta]) -> None:
    """Raise `CheckpointError` for more layers, or larger ones, than there can be: building them would take forever."""
    layers, experts = min(len(tensors), MOST_LAYERS), max(len(tensors), _MAX_EXPERTS)
    size = max(_MAX_SIZE, *(8 * meta.nbytes for meta in tensors.values())) if tensors else _MAX_SIZE
    limits = ((LAYERS, layers), (_EXPERTS, experts), (_SIZES, size))
    nested = [part for part in config.values() if isinstance(part, dict)]
    for key, value in (item for part in (config, *nested) for item in part.items()):
        if isinstance(value, int) and any(value > limit and names.fullmatch(str(key)) for names, limit in limits):
            raise CheckpointError(
                f"{folder / 'config.json'}: {key} is {str(value)[:40]}, and the files hold {len(tensors)} tensors",
                hint="config.json and weights are of different models: do not trust this checkpoint",
            )
