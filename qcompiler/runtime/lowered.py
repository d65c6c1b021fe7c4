"""Evaluate a lowered graph on the checkpoint it was lowered to, as Transformers with compressed-tensors computes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.capture import capture_graph
from qcompiler.checkpoints.reader import CheckpointReader
from qcompiler.data.batches import TokenBatch
from qcompiler.errors import CheckpointError
from qcompiler.formats import cache_scale
from qcompiler.ir.annotations import Quant, set_quant
from qcompiler.ir.edit import stand_between
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.ops import fake_quantize, fake_quantize_cache, quantized_linear
from qcompiler.ir.partition import partitions
from qcompiler.lowering.read import CompressedReader
from qcompiler.lowering.rewrite import lower_graph
from qcompiler.meta import build_on_meta
from qcompiler.numerics import fake_quantize as round_activations
from qcompiler.patterns.cache import cached_tensors
from qcompiler.runtime.evaluate import Handler
from qcompiler.runtime.executor import lazy_weights
from qcompiler.runtime.stream import Stream, always
from qcompiler.scheme import Strategy
from qcompiler.source import ModelSource, read_config


@dataclass(frozen=True, slots=True)
class Lowered:
    """A compressed-tensors checkpoint as a graph of quantized operations. Close it, or use it as a context manager."""

    graph: Graph
    source: ModelSource
    reader: CompressedReader

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_lowered(folder: Path, *, trust_remote_code: bool = False) -> Lowered:
    """The lowered graph of a compressed-tensors checkpoint, rebuilt from its config, and its weights.

    Raises `CheckpointError` where the folder is no such checkpoint.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    quantization = _quantization_config(folder / "config.json")
    del config.quantization_config
    dtype = config.dtype or torch.float32
    model = build_on_meta(config, dtype=dtype, trust_remote_code=trust_remote_code)
    files = CheckpointReader.open(folder)
    try:
        reader = CompressedReader(files, quantization, dtype)
        source = ModelSource(folder, config, model, trust_remote_code, lambda _: reader)
        return Lowered(_lowered_graph(source, reader), source, reader)
    except BaseException:
        files.close()
        raise


def _lowered_graph(source: ModelSource, reader: CompressedReader) -> Graph:
    graph = capture_graph(source.model)
    for node, leaf in graph.linears():
        scheme = reader.schemes.get(_disk_name(source, leaf.path))
        if scheme is not None:
            set_quant(node, Quant(scheme, "stored", (f"{source.folder.name}: config.json",)))
    graph.kv_cache = reader.config.kv_cache
    lower_graph(graph)
    if graph.kv_cache is not None:
        for cached in list(cached_tensors(graph)):
            stand_between(graph, cached.node, fake_quantize_cache, cached.path, cached.part)
    graph.stage = Stage.LOWERED
    return graph


def _quantization_config(file: Path) -> dict[str, Any]:
    quantization = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"{file} has no quantization_config: this checkpoint is not quantized", hint="compile it first"
        )
    return quantization


def _disk_name(source: ModelSource, path: str) -> str:
    """The name on disk of the module at `path`."""
    return source.names.sources(f"{path}.weight")[0].key.removesuffix(".weight")


def logits(lowered: Lowered, batches: Sequence[TokenBatch], device: torch.device) -> list[Tensor]:
    """The logits [B, S, V] of every batch, partition by partition: one partition's dense weights at a time."""
    graph, source = lowered.graph, lowered.source
    parts = partitions(graph)
    stream = Stream(graph, parts, batches, device)
    for part in parts:
        weights = lazy_weights(graph, part, source, device)
        handlers: dict[Any, Handler] = {
            quantized_linear: partial(_multiply, weights),
            fake_quantize: partial(_round, lowered),
            fake_quantize_cache: partial(_round_cache, lowered),
        }
        stream.run(part, part.nodes, weights, always(handlers), keep=True)
    return stream.outputs()


def _multiply(weights: Mapping[str, Tensor], node: Node, args: tuple[Any, ...]) -> Tensor:
    x, path = args
    return functional.linear(x, weights[f"{path}.weight"], weights.get(f"{path}.bias"))


def _round(lowered: Lowered, node: Node, args: tuple[Any, ...]) -> Tensor:
    x, path = args
    name = _disk_name(lowered.source, path)
    spec = lowered.reader.schemes[name].input_activations
    assert spec is not None, f"{path} has a fake_quantize, and no scheme for its input"
    shape = x.shape
    if spec.strategy is Strategy.TOKEN:
        x = _as_the_library_sees_tokens(x)
    stored = {part: tensor.to(x.device) for part, tensor in lowered.reader.parts(name, prefix="input_").items()}
    rounded = round_activations(
        x,
        spec,
        scale=stored.get("input_scale"),
        zero_point=stored.get("input_zero_point"),
        global_scale=stored.get("input_global_scale"),
    )
    return rounded.reshape(shape)


def _round_cache(lowered: Lowered, node: Node, args: tuple[Any, ...]) -> Tensor:
    x, path, part = args
    spec = lowered.graph.kv_cache
    assert spec is not None, f"{path} rounds its cache, and the config does not say how"
    scale = lowered.reader.read(f"{lowered.source.names.disk_module(path)}.{cache_scale(part)}")
    return round_activations(x, spec.numbers, scale=scale.to(x.device))


def _as_the_library_sees_tokens(x: Tensor) -> Tensor:
    """`x` with one row for each scale that compressed-tensors takes: the first two dimensions count its tokens.

    That is one a token where `x` is [batch, tokens, features], as runtimes have it always. Of [tokens, features]
    (shared experts) it takes a single scale, and of [batch, 1, tokens, features] (latent attention) one a sequence.
    """
    return x.reshape(1, -1) if x.dim() == 2 else x.flatten(2)
