"""Edits that break the rules of scales that move."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompiler.ir.annotations import ChannelObserver, Rescale, annotate
from qcompiler.ir.graph import Graph
from qcompiler.ir.ops import observe
from qcompiler.transforms.options import AwqOptions, SmoothQuantOptions
from tests.ir.graphs import insert, leaf, op
from tests.ir.violations.case import ACTIVATION, GATE, LAYER, NORM, K, Q, breaks

V = f"{LAYER}.self_attn.v_proj"


def scale(**said: Any) -> Rescale:
    """What the norm gives to q, k and v; nobody asks for it."""
    facts: dict[str, Any] = {
        "id": "test",
        "kind": "norm -> attention-input",
        "producer": NORM,
        "transform": SmoothQuantOptions(),
        "asked": (),
        "consumers": (Q, K, V),
        "channels": torch.arange(1),
        "tied": False,
        "gains": (),
        "because": ("test",),
    } | said
    return Rescale(**{"weights": tuple(f"{path}.weight" for path in facts["consumers"]), **facts})


def give(node: fx.Node, rescale: Rescale) -> fx.Node:
    annotate(node, rescale)
    return node


@breaks(
    "rescale-on-producer",
    "it is annotated with a scale to give, but is no norm and no linear",
    module=ACTIVATION,
)
def an_activation_gives_a_scale(graph: Graph) -> fx.Node:
    return give(op(graph, "silu"), scale())


@breaks("rescale-on-producer", f"it is annotated with the scale that {NORM} gives", module=f"(module {GATE})")
def a_linear_gives_the_scale_of_a_norm(graph: Graph) -> fx.Node:
    return give(leaf(graph, GATE), scale())


@breaks(
    "rescale-consumers",
    f"it gives a scale to {LAYER}.gone, which is no linear of the graph",
    module=f"(module {NORM})",
)
def a_scale_goes_nowhere(graph: Graph) -> fx.Node:
    return give(leaf(graph, NORM), scale(consumers=(Q, f"{LAYER}.gone")))


@breaks(
    "rescale-consumers",
    f"its scale is chosen by {LAYER}.gone, which does not take it",
    module=f"(module {NORM})",
)
def a_scale_is_chosen_by_another(graph: Graph) -> fx.Node:
    return give(leaf(graph, NORM), scale(asked=(f"{LAYER}.gone",)))


@breaks("rescale-consumers", "it gives a scale to 3 linears, and changes 1 weights", module=f"(module {NORM})")
def a_scale_leaves_weights_as_they_are(graph: Graph) -> fx.Node:
    return give(leaf(graph, NORM), scale(weights=(f"{Q}.weight",)))


@breaks(
    "rescale-measured",
    "smoothquant is chosen by its inputs, and no observer before it collects channels",
    module=f"(module {Q})",
)
def nothing_measures_the_channels(graph: Graph) -> fx.Node:
    give(leaf(graph, NORM), scale(asked=(Q,)))
    return leaf(graph, Q)


@breaks(
    "rescale-measured",
    "awq is chosen by its inputs, and no observer before it collects hessian",
    module=f"(module {Q})",
)
def awq_has_no_hessian(graph: Graph) -> fx.Node:
    give(leaf(graph, NORM), scale(asked=(Q,), transform=AwqOptions()))
    shared = leaf(graph, Q).args[0]
    channels = insert(graph, observe, shared.args[0], like=shared)
    annotate(channels, ChannelObserver("test", (Q,), ("test",)))
    shared.args = (channels,)
    return leaf(graph, Q)
