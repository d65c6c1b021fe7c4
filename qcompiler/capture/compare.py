"""Prove that a captured graph computes what the model computes, at a shape other than the one it was traced at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qcompiler.capture.graph import capture_graph
from qcompiler.capture.twin import build_twin, with_random_weights
from qcompiler.capture.twin_sizes import is_crossed
from qcompiler.collector import collector_paused
from qcompiler.errors import CaptureError
from qcompiler.ir.annotations import Leaf, get
from qcompiler.ir.fx import Node, op_name
from qcompiler.ir.graph import Graph, Partition
from qcompiler.ir.partition import partitions
from qcompiler.meta import build_on_meta
from qcompiler.runtime.evaluate import evaluate

_SHAPE = (3, 13)
_SMALL = 16_000_000
"""Parameters of a model that is compared itself: to run it takes less time than to trace a twin."""
_LEAK = 0.03
"""What a later token may change in earlier logits, in their standard deviations: experts round what they batch."""


class NotTheModelError(CaptureError):
    """The graph's logits are not the model's."""


@collector_paused()
def capture_and_prove(model: PreTrainedModel, *, trust_remote_code: bool = False) -> tuple[Graph, list[str]]:
    """Capture a model and compare the graph with eager execution; the graph, and notes on how it was captured.

    Where the graph was made of copied layers and is not the model, something depends on the layer's index: every layer
    is traced, and compared again. Raises `CaptureError` where the model cannot be captured, is not causal, or the graph
    still is not the model.
    """
    graph = capture_graph(model)
    try:
        compare_with_eager(graph, trust_remote_code=trust_remote_code)
    except NotTheModelError as error:
        if not has_copies(graph):
            raise
        graph = capture_graph(model, repeat=False)
        compare_with_eager(graph, trust_remote_code=trust_remote_code)
        return graph, [f"every layer was traced, since layers that look alike are not: {error.message}"]
    return graph, []


def has_copies(graph: Graph) -> bool:
    """Whether any layer of the graph is a copy of another's trace."""
    return len(set(graph.like.values())) < len(graph.like)


def compare_with_eager(graph: Graph, *, trust_remote_code: bool = False) -> None:
    """Compare a graph with eager execution: of its own model where that has weights or is small, else of a twin.

    A small model gets random weights. A twin is a shrunken model that is captured in the same way, has two layers of
    every kind that was traced once and copied, and must show every kind of partition that the graph has. Then the graph
    and the eager forward pass must agree to the last bit. Raises `CaptureError` otherwise.
    """
    compare_logits(*eager_twin(graph, trust_remote_code=trust_remote_code))


def eager_twin(graph: Graph, *, trust_remote_code: bool = False) -> tuple[Graph, PreTrainedModel]:
    """A model with weights that shows what a graph is of, and the graph of that model: see `compare_with_eager`."""
    if graph.model.device.type != "meta":
        return graph, graph.model
    config, dtype = graph.model.config, graph.model.dtype
    if graph.model.num_parameters() <= _SMALL and is_crossed(config, _SHAPE[1]):
        return graph, with_random_weights(config, dtype=dtype, trust_remote_code=trust_remote_code)
    twin = build_twin(config, layers=_depth(graph), dtype=dtype, trust_remote_code=trust_remote_code)
    bare = build_on_meta(twin.config, dtype=twin.dtype, trust_remote_code=trust_remote_code)
    twin_graph = capture_graph(bare, repeat=bool(graph.like))
    shown = {_kind(part) for part in partitions(twin_graph)}
    for part in partitions(graph):
        if _kind(part) not in shown:
            raise CaptureError(
                f"{type(graph.model).__name__}: {part.name} is of a kind that no partition of its shrunken twin is of, "
                "so the graph cannot be compared with eager",
                hint="pass the loaded model instead of its folder",
            )
    return twin_graph, twin


def compare_logits(graph: Graph, model: PreTrainedModel) -> None:
    """Compare a graph with the eager forward pass of a model that has weights, and that pass with causality.

    Raises `CaptureError` when a later token changes an earlier logit, or when any bit differs.
    """
    ids = some_tokens(model)
    wanted = causal_logits(model, ids)
    got = graph_logits(graph, ids, tensors_of(graph, model))
    if not torch.equal(got, wanted):
        difference = (got.double() - wanted.double()).abs().max().item()
        raise NotTheModelError(
            f"the captured graph of {type(model).__name__} does not compute what the model computes: at batch "
            f"{_SHAPE[0]} and length {_SHAPE[1]} logits differ by up to {difference:.3g}",
            hint="this is a defect of the capture or of the model's own tracing support; please report the model type",
        )


def some_tokens(model: PreTrainedModel) -> Tensor:
    """Token ids [B, S] of a shape other than the one that graphs are traced at."""
    return torch.randint(3, model.config.vocab_size - 1, _SHAPE, generator=torch.Generator().manual_seed(0))


def causal_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits [B, S, V] of a model with weights on token ids [B, S], by its eager forward pass.

    Sequences are padded on the right without a mask, which is right only where no token sees those after it: raises
    `CaptureError` where the last token changes an earlier logit.
    """
    other = torch.cat([ids[:, :-1], ids[:, -1:] - 1], dim=1)
    with torch.no_grad():
        logits, changed = (model(input_ids=tokens, use_cache=False).logits for tokens in (ids, other))
    leak = (logits - changed)[:, :-1].abs().max() / logits.float().std()
    if leak > _LEAK:
        raise CaptureError(
            f"{type(model).__name__} is not causal: a later token changes an earlier logit "
            f"(by {leak:.2g} standard deviations)",
            hint="only decoders are compiled; some encoders become one with is_decoder=true in their config",
        )
    return cast(Tensor, logits)


def graph_logits(graph: Graph, ids: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The logits [B, S, V] of a whole graph on token ids [B, S], with every parameter and buffer in `tensors`."""
    return graph_values(graph, ids, tensors, [graph.output])[graph.output]


@torch.no_grad()
def graph_values(
    graph: Graph, ids: Tensor, tensors: Mapping[str, Tensor], keep: Collection[Node]
) -> dict[Node, Tensor]:
    """What the nodes of `keep` are where a whole graph runs on token ids [B, S], with its tensors in `tensors`."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    return evaluate(
        nodes, {graph.input: ids}, root=graph.model, tensors=tensors, device=ids.device, keep=keep, handlers={}
    )


def tensors_of(graph: Graph, model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor that a graph reads, by path, out of a model with weights."""
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers()
    return {**graph.constants, **dict(parameters), **dict(buffers), **graph.buffers}


def _depth(graph: Graph) -> int | None:
    """How many layers show every traced kind, and those that were copied twice; None where nothing was copied."""
    seen: Counter[str] = Counter()
    depth = None
    first = 0
    for index, like in enumerate(graph.like.values()):
        seen[like] += 1
        if seen[like] == 1:
            first = index + 1
        elif seen[like] == 2:
            depth = index + 1
    return None if depth is None else max(depth, first)


def _kind(part: Partition) -> tuple[object, ...]:
    """What a partition computes, sizes and the names of weights aside: its operations and leaves in order."""
    leaves = [(node, get(node, Leaf)) for node in part.nodes if node.op != "get_attr"]
    return (part.layer is None, *(str(leaf.kind) if leaf else op_name(node) for node, leaf in leaves))
