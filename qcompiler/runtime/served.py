"""What evaluates solved linears, and observed keys and values, as they will be served."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qcompiler.ir.annotations import Leaf, Observer, get, need, scheme_of
from qcompiler.ir.fx import Node
from qcompiler.ir.ops import observe
from qcompiler.numerics import dequantize
from qcompiler.pipeline.base import PartitionWork
from qcompiler.runtime.evaluate import Handler
from qcompiler.runtime.quantized import QuantizedOperations, Rounding


def served(work: PartitionWork, nodes: Iterable[Node], model: PreTrainedModel) -> dict[Any, Handler]:
    """What evaluates the solved linears among `nodes`, and observed keys and values, as they will be served.

    Their dequantized weights take the place of those in `work.weights`.
    """
    inputs: dict[str, Rounding] = {}
    linears: set[Any] = set()
    for node, path in solved_among(work, nodes):
        if node.target in linears:
            continue
        linears.add(node.target)
        solved, scheme = work.solved[path], scheme_of(node)
        assert scheme is not None
        work.weights[f"{path}.weight"] = dequantize(solved.weight, model.dtype)
        if scheme.input_activations is not None:
            inputs[path] = Rounding(
                scheme.input_activations, solved.input_scale, solved.input_zero_point, solved.input_global_scale
            )
    caches = {(o.consumers[0], str(o.purpose)): Rounding(o.spec, scale) for o, scale in work.caches.items()}
    operations = QuantizedOperations(model, work.weights, inputs, caches)
    return {observe: partial(_round_cache, operations)} | dict.fromkeys(linears, partial(_run_linear, operations))


def solved_among(work: PartitionWork, nodes: Iterable[Node]) -> Iterator[tuple[Node, str]]:
    """The solved linears among `nodes`, with their paths."""
    for node in nodes:
        leaf = get(node, Leaf)
        if leaf is not None and leaf.path in work.solved and scheme_of(node) is not None:
            yield node, leaf.path


def _round_cache(operations: QuantizedOperations, node: Node, args: tuple[Any, ...]) -> Tensor:
    """Observed keys and values as the cache will hold them; observed inputs are rounded by their linears."""
    observer = get(node, Observer)
    x: Tensor = args[0]
    if observer is None or (observer.consumers[0], observer.purpose) not in operations.caches:
        return x
    return operations.fake_quantize_cache(x, observer.consumers[0], observer.purpose)


def _run_linear(operations: QuantizedOperations, node: Node, args: tuple[Any, ...]) -> Tensor:
    layer = need(node, Leaf).path
    x = operations.fake_quantize(args[0], layer) if layer in operations.inputs else args[0]
    return operations.quantized_linear(x, layer)
