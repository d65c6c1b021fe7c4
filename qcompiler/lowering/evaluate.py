"""Evaluate a lowered graph on the checkpoint it was lowered to, as Transformers with compressed-tensors computes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from qcompiler.capture import capture_graph
from qcompiler.checkpoints.reader import CheckpointReader
from qcompiler.data.batches import TokenBatch
from qcompiler.errors import CaptureError, CheckpointError, VerificationError
from qcompiler.formats import cache_scale
from qcompiler.ir.annotations import Quant, get_quant, set_quant
from qcompiler.ir.edit import stand_between
from qcompiler.ir.fx import Node
from qcompiler.ir.graph import Graph, Partition, Stage
from qcompiler.ir.ops import fake_quantize, fake_quantize_cache
from qcompiler.ir.partition import partitions
from qcompiler.lowering.read import CompressedReader
from qcompiler.lowering.rewrite import lower_graph
from qcompiler.meta import build_on_meta
from qcompiler.patterns.cache import cached_tensors
from qcompiler.runtime.quantized import QuantizedOperations, Rounding
from qcompiler.runtime.stream import Stream, always
from qcompiler.runtime.weights import lazy_weights
from qcompiler.scheme import Strategy
from qcompiler.source import ModelSource, read_config


@dataclass(frozen=True, slots=True)
class Lowered:
    """A compressed-tensors checkpoint as a graph of quantized operations. Close it, or use it as a context manager."""

    graph: Graph
    source: ModelSource
    reader: CompressedReader

    def quantized(self) -> dict[str, str]:
        """The path of each quantized linear, with its name on disk."""
        nodes = self.graph.linears()
        return {leaf.path: disk_name(self.source, leaf.path) for node, leaf in nodes if get_quant(node) is not None}

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


Annotate = Callable[[Graph, ModelSource], None]
"""What is known of a captured graph from elsewhere: which rules decided on its linears."""


def open_lowered(folder: Path, *, trust_remote_code: bool = False, annotate: Annotate | None = None) -> Lowered:
    """The lowered graph of a compressed-tensors checkpoint, rebuilt from its config, and its weights.

    annotate: called with the captured graph first. What it decides stands where it is what the checkpoint holds.
    Raises `CheckpointError` where the folder is no such checkpoint, `VerificationError` where the model's graph cannot
    be captured from its config alone.
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
        return Lowered(_lowered_graph(source, reader, annotate), source, reader)
    except BaseException:
        files.close()
        raise


def _lowered_graph(source: ModelSource, reader: CompressedReader, annotate: Annotate | None) -> Graph:
    try:
        graph = capture_graph(source.model)
    except CaptureError as error:  # of a model that was compiled loaded, its folder may say too little
        raise VerificationError(
            f"{source.folder}: its graph cannot be rebuilt from its config, so nothing can be compared with it: "
            f"{error.message}",
            hint="this is no sign of damage: judge the checkpoint in the runtime that serves it",
        ) from error
    if annotate is not None:
        annotate(graph, source)
    for node, leaf in graph.linears():
        scheme, decided = reader.schemes.get(disk_name(source, leaf.path)), get_quant(node)
        if scheme != (decided.scheme if decided is not None else None):
            because = (f"{source.folder.name}: config.json",)
            stored = Quant(scheme, "stored" if scheme is not None else "none", because)
            set_quant(node, stored, replacing=decided)
    graph.kv_cache = reader.config.kv_cache
    lower_graph(graph)
    if graph.kv_cache is not None:
        for cached in cached_tensors(graph):
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


def disk_name(source: ModelSource, path: str) -> str:
    """The name on disk of the module at `path`."""
    return source.names.sources(f"{path}.weight")[0].key.removesuffix(".weight")


def logits(lowered: Lowered, batches: Sequence[TokenBatch], device: torch.device) -> list[Tensor]:
    """The logits [B, S, V] of every batch, partition by partition: one partition's dense weights at a time."""
    graph, source = lowered.graph, lowered.source
    parts = partitions(graph)
    stream = Stream(graph, parts, batches, device)
    for part in parts:
        weights = lazy_weights(graph, part, source, device)
        operations = _operations(lowered, part, weights, device)
        handlers = operations.handlers() | {fake_quantize: partial(_round_as_the_library, operations)}
        stream.run(part, part.nodes, weights, always(handlers), keep=True)
    return stream.outputs()


def _operations(
    lowered: Lowered, part: Partition, weights: Mapping[str, Tensor], device: torch.device
) -> QuantizedOperations:
    """A partition's quantized operations, on the numbers that the checkpoint stores."""
    source, reader = lowered.source, lowered.reader
    inputs: dict[str, Rounding] = {}
    caches: dict[tuple[str, str], Rounding] = {}
    for node in part.nodes:
        if node.target is fake_quantize:
            path = str(node.args[1])
            name = disk_name(source, path)
            spec = reader.schemes[name].input_activations
            assert spec is not None, f"{path} has a fake_quantize, and no scheme for its input"
            numbers = reader.parts(name, prefix="input_").items()
            stored = {key.removeprefix("input_"): number.to(device) for key, number in numbers}
            inputs[path] = Rounding(spec, **stored)
        elif node.target is fake_quantize_cache:
            path, kind = (str(arg) for arg in node.args[1:])
            assert lowered.graph.kv_cache is not None, f"{path} rounds its cache, and the config does not say how"
            scale = reader.read(f"{source.names.disk_module(path)}.{cache_scale(kind)}")
            caches[path, kind] = Rounding(lowered.graph.kv_cache.numbers, scale.to(device))
    return QuantizedOperations(lowered.graph.model, weights, inputs, caches)


def _round_as_the_library(operations: QuantizedOperations, node: Node, args: tuple[Any, ...]) -> Tensor:
    """Tokens in rows as compressed-tensors counts them: its first two dimensions do, and each row has one scale.

    That is one a token where `x` is [batch, tokens, features], as runtimes have it always. Of [tokens, features]
    (shared experts) it takes a single scale, and of [batch, 1, tokens, features] (latent attention) one a sequence.
    """
    x, layer = args
    if operations.inputs[layer].spec.strategy is not Strategy.TOKEN:
        return operations.fake_quantize(x, layer)
    rows = x.reshape(1, -1) if x.dim() == 2 else x.flatten(2)
    return operations.fake_quantize(rows, layer).reshape(x.shape)
