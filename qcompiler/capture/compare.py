"""Prove that a captured graph computes what the model computes, at a shape other than the one it was traced at."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qcompiler.capture.twin import build_twin
from qcompiler.errors import CaptureError
from qcompiler.ir.annotations import Leaf, get
from qcompiler.ir.fx import op_name
from qcompiler.ir.graph import Graph, Partition
from qcompiler.ir.partition import partitions
from qcompiler.runtime.evaluate import evaluate

_SHAPE = (3, 13)


def compare_with_eager(graph: Graph, *, trust_remote_code: bool = False) -> None:
    """Compare a graph of a model on the meta device with eager execution, on a shrunken twin of the same architecture.

    The twin is captured in the same way, has two layers of every kind that was traced once and copied, and must show every
    kind of partition that the graph has. Then its graph and its eager forward pass must agree to the last bit. Raises
    `CaptureError` otherwise.
    """
    from qcompiler.capture import capture_graph
    from qcompiler.source import build_on_meta

    twin = build_twin(
        graph.model.config, layers=_depth(graph), dtype=graph.model.dtype, trust_remote_code=trust_remote_code
    )
    bare = build_on_meta(twin.config, dtype=twin.dtype, trust_remote_code=trust_remote_code)
    twin_graph = capture_graph(bare)
    shown = {_kind(part) for part in partitions(twin_graph)}
    for part in partitions(graph):
        if _kind(part) not in shown:
            raise CaptureError(
                f"{type(graph.model).__name__}: {part.name} is of a kind that no partition of its shrunken twin is of, so the "
                "graph cannot be compared with eager",
                hint="pass the loaded model instead of its folder",
            )
    compare_logits(twin_graph, twin)


def compare_logits(graph: Graph, model: PreTrainedModel) -> None:
    """Compare a graph with the eager forward pass of a model that has weights. Raises `CaptureError` on any difference."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size - 1, _SHAPE, generator=generator)
    state = {**graph.constants, **dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with torch.no_grad():
        got = graph_logits(graph, ids, state | graph.buffers)
        wanted = model(input_ids=ids, use_cache=False).logits
    if not torch.equal(got, wanted):
        difference = (got.double() - wanted.double()).abs().max().item()
        raise CaptureError(
            f"the captured graph of {type(model).__name__} does not compute what the model computes: at batch {_SHAPE[0]} "
            f"and length {_SHAPE[1]} logits differ by up to {difference:.3g}",
            hint="this is a defect of the capture or of the model's own tracing support; please report the model type",
        )


def graph_logits(graph: Graph, ids: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The logits [B, S, V] of a whole graph on token ids [B, S], with every parameter and buffer in `tensors`."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    values = evaluate(
        nodes,
        {graph.input: ids},
        root=graph.model,
        tensors=tensors,
        device=ids.device,
        keep=[graph.output],
        handlers={},
    )
    logits: Tensor = values[graph.output]
    return logits


def _depth(graph: Graph) -> int | None:
    """How many layers show each copied kind twice; None where nothing was copied."""
    seen: Counter[str] = Counter()
    depth = None
    for index, like in enumerate(graph.like.values()):
        seen[like] += 1
        if seen[like] == 2:
            depth = index + 1
    return depth


def _kind(part: Partition) -> tuple[object, ...]:
    """What a partition computes, sizes aside: its operations and leaves in order."""
    leaves = [(node, get(node, Leaf)) for node in part.nodes]
    return (part.layer is None, *(str(leaf.kind) if leaf else op_name(node) for node, leaf in leaves))
