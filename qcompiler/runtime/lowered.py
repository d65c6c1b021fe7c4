"""Evaluate a lowered graph on the checkpoint it was lowered to: what a faithful runtime computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig

from qcompiler.capture import capture_graph
from qcompiler.checkpoints.decompress import CompressedReader
from qcompiler.checkpoints.reader import CheckpointReader
from qcompiler.data.batches import TokenBatch
from qcompiler.errors import CheckpointError
from qcompiler.ir.annotations import Quant, set_quant
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.ops import fake_quantize, quantized_linear
from qcompiler.ir.partition import partitions
from qcompiler.lowering.rewrite import lower_graph
from qcompiler.numerics import fake_quantize as round_activations
from qcompiler.runtime.evaluate import Handler
from qcompiler.runtime.stream import Stream, always, tensor_paths
from qcompiler.source import ModelSource, build_on_meta


def open_lowered(folder: Path, *, trust_remote_code: bool = False) -> tuple[Graph, ModelSource]:
    """The lowered graph of a compressed-tensors checkpoint, rebuilt from its config, and its weights.

    Raises `CheckpointError` where the folder is no such checkpoint.
    """
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantization = raw["quantization_config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a quantized checkpoint: {error!r}") from error
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    del config.quantization_config
    dtype = config.dtype or torch.float32
    model = build_on_meta(config, dtype=dtype, trust_remote_code=trust_remote_code)
    opener = partial(_open_weights, quantization=quantization, dtype=dtype)
    source = ModelSource(folder, config, model, trust_remote_code, opener)
    graph = capture_graph(model)
    reader = source.reader
    assert isinstance(reader, CompressedReader)
    for node, leaf in graph.linears():
        scheme = reader.schemes.get(disk_name(source, leaf.path))
        if scheme is not None:
            set_quant(node, Quant(scheme, "stored", (f"{folder.name}: config.json",)))
    graph.kv_cache = reader.config.kv_cache
    lower_graph(graph)
    graph.stage = Stage.LOWERED
    return graph, source


def _open_weights(folder: Path, *, quantization: dict[str, Any], dtype: torch.dtype) -> CheckpointReader:
    return CompressedReader(CheckpointReader.open(folder), quantization, dtype)


def disk_name(source: ModelSource, path: str) -> str:
    """The name on disk of the module at `path`."""
    return source.names.sources(f"{path}.weight")[0].key.removesuffix(".weight")


def logits(graph: Graph, source: ModelSource, batches: Sequence[TokenBatch], device: torch.device) -> list[Tensor]:
    """The logits [B, S, V] of every batch, partition by partition: one partition's dense weights at a time."""
    parts = partitions(graph)
    stream = Stream(graph, parts, batches, device)
    handlers = {quantized_linear: _linear_handler, fake_quantize: _activation_handler}
    own = graph.buffers | graph.constants
    for part in parts:
        paths = tensor_paths(graph, part)
        loaded = source.load([path for path in paths if path not in own])
        weights = {path: (own[path] if path in own else loaded[path]).to(device) for path in paths}
        bound: dict[Any, Handler] = {op: partial(handler, source, weights) for op, handler in handlers.items()}
        stream.run(part, part.nodes, weights, always(bound), keep=True)
    return stream.outputs()


def _linear_handler(source: ModelSource, weights: dict[str, Tensor], node: Node, args: tuple[Any, ...]) -> Tensor:
    x, path = args
    return functional.linear(x, weights[f"{path}.weight"], weights.get(f"{path}.bias"))


def _activation_handler(source: ModelSource, weights: dict[str, Tensor], node: Node, args: tuple[Any, ...]) -> Tensor:
    x, path = args
    reader = source.reader
    assert isinstance(reader, CompressedReader)
    name = disk_name(source, path)
    scheme = reader.schemes[name]
    assert scheme.input_activations is not None
    stored = {part: tensor.to(x.device) for part, tensor in reader.parts(name).items() if part.startswith("input_")}
    return round_activations(
        x,
        scheme.input_activations,
        scale=stored.get("input_scale"),
        zero_point=stored.get("input_zero_point"),
        global_scale=stored.get("input_global_scale"),
    )
