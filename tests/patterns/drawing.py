"""Small graphs drawn by hand: real modules and operations, each run as it is drawn so that shapes are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from qcompiler.capture.roles import annotate_roles
from qcompiler.ir.annotations import Leaf, LeafKind, Scope, annotate
from qcompiler.ir.fx import map_nodes, value
from qcompiler.ir.graph import Graph

ATEN = torch.ops.aten
BATCH, TOKENS = 2, 3
_IN_LAYER = tuple(Scope(((path, path),)) for path in ("layers.0", "layers.1"))


class Drawing:
    """A graph that is being drawn. Its modules stand in `layers.0` or `layers.1`."""

    def __init__(self, width: int = 8) -> None:
        self.fx = fx.Graph()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Module(), nn.Module()])
        self.constants: dict[str, Tensor] = {}
        self.x = self.fx.placeholder("x")
        self.x.meta["val"] = torch.randn(BATCH, TOKENS, width)

    def op(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.fx.call_function(target, args, kwargs)
        node.meta["val"] = target(*map_nodes(args, value), **map_nodes(kwargs, value))
        return node

    def leaf(self, name: str, module: nn.Module, x: fx.Node, kind: LeafKind, *, layer: int = 0) -> fx.Node:
        """A call of `module`; of the one that is there, where this layer has one of this name."""
        inside = self.model.layers[layer]
        if not hasattr(inside, name):
            inside.add_module(name, module)
        module, path = inside.get_submodule(name), f"layers.{layer}.{name}"
        node = self.fx.call_module(path, (x,))
        node.meta["val"] = module(value(x)).detach()
        sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (0, 0)
        bias = getattr(module, "bias", None) is not None
        annotate(node, Leaf(kind, path, type(module).__name__, 0, *sizes, bias))
        annotate(node, _IN_LAYER[layer])
        return node

    def linear(self, name: str, x: fx.Node, out: int = 8, *, layer: int = 0, bias: bool = True) -> fx.Node:
        return self.leaf(name, nn.Linear(value(x).shape[-1], out, bias=bias), x, LeafKind.LINEAR, layer=layer)

    def norm(self, name: str, x: fx.Node, *, affine: bool = True) -> fx.Node:
        return self.leaf(name, nn.RMSNorm(value(x).shape[-1], elementwise_affine=affine), x, LeafKind.NORM)

    def bare_linear(self, name: str, x: fx.Node, out: int = 4) -> fx.Node:
        """A linear on a parameter that a module owns, as routers are."""
        owner = nn.Module()
        owner.kernel = nn.Parameter(torch.randn(out, value(x).shape[-1]))
        self.model.layers[0].add_module(name, owner)
        weight = self.fx.get_attr(f"layers.0.{name}.kernel")
        weight.meta["val"] = owner.kernel.detach()
        if value(x).dtype != owner.kernel.dtype:
            weight = self.op(ATEN.to.dtype, weight, value(x).dtype)
        node = self.op(ATEN.linear.default, x, weight)
        annotate(node, Leaf(LeafKind.BARE_LINEAR, f"layers.0.{name}", "Module", 0, value(x).shape[-1], out))
        annotate(node, _IN_LAYER[0])
        return node

    def constant(self, tensor: Tensor) -> fx.Node:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor
        node = self.fx.get_attr(name)
        node.meta["val"] = tensor
        return node

    def done(self, *outputs: fx.Node) -> Graph:
        """The graph, which returns these nodes."""
        self.fx.output(outputs[0] if len(outputs) == 1 else outputs)
        graph = Graph(self.fx, cast(PreTrainedModel, self.model), constants=self.constants)
        annotate_roles(graph)
        return graph
