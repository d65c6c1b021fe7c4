"""Raise: fold the nodes of each leaf module back into one `call_module` node on the module's own path."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import fx, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qcompiler.capture.experts import EXPERTS_OP
from qcompiler.ir.annotations import Leaf, LeafKind, Scope, annotate, need
from qcompiler.ir.fx import Node, erase_dead, inputs, is_op, rank, tensor_arg, value

_NORM_REDUCTIONS = ("aten.mean", "aten.var", "aten.var_mean", "aten.linalg_vector_norm", "aten.norm")
_CASTS = ("aten.to", "aten._to_copy", "aten.type_as")
_NORM_OPS = ("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")


def raise_leaves(graph: fx.Graph, model: PreTrainedModel) -> None:
    """Replace each leaf module's nodes by one `call_module` node annotated with a `Leaf`.

    Only what is known to be the plain computation is raised: a module whose class inherits `forward` itself from
    `nn.Linear`, `nn.Embedding` or `Conv1D`; a linear with a forward of its own and norms by what they compute; and
    expert blocks. Everything else stays as it was traced.
    """
    regions: dict[str, list[Node]] = defaultdict(list)
    blocks: dict[str, tuple[str, list[Node]]] = {}
    for node in graph.nodes:
        calls = need(node, Scope).calls
        if node.op != "call_function" or not calls:
            continue
        regions[calls[-1][0]].append(node)
        for key, path in calls:
            if _holds_experts(model.get_submodule(path)):
                blocks.setdefault(key, (path, []))[1].append(node)
    for nodes in regions.values():
        path = need(nodes[0], Scope).calls[-1][1]
        module = model.get_submodule(path)
        kind = _kind(module, nodes)
        if kind is not None:
            _fold(graph, kind, path, module, nodes)
    for path, nodes in blocks.values():
        if not any(is_op(node, EXPERTS_OP) for node in nodes):
            _fold(graph, LeafKind.EXPERTS, path, model.get_submodule(path), nodes)
    erase_dead(graph)
    _mark_bare_linears(graph, model)


def _kind(module: nn.Module, nodes: Sequence[Node]) -> LeafKind | None:
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return LeafKind.LINEAR
    if isinstance(module, nn.Linear) and _multiplies(nodes):
        return LeafKind.LINEAR
    if forward is Conv1D.forward:
        return LeafKind.CONV1D
    if forward is nn.Embedding.forward:
        return LeafKind.EMBEDDING
    if any(is_op(node, EXPERTS_OP) for node in nodes):
        return LeafKind.EXPERTS
    if not list(module.children()) and _normalizes(nodes):
        return LeafKind.NORM
    return None


def _multiplies(nodes: Sequence[Node]) -> bool:
    """Whether these nodes are x @ W.T + b spelled out, and nothing else."""
    parts = ("aten.numpy_T", "aten.t", "aten.transpose", "aten.permute", "aten.matmul", "aten.linear", "aten.add")
    products = sum(is_op(node, "aten.matmul", "aten.linear") for node in nodes)
    return products == 1 and all(is_op(node, *parts) for node in nodes)


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module stacks the weights of several linears in parameters of its own."""
    return sum(parameter.dim() == 3 for parameter in module.parameters(recurse=False)) > 1


def _normalizes(nodes: Sequence[Node]) -> bool:
    """Whether these nodes divide their input by a root of its own mean square or variance."""
    if any(is_op(node, *_NORM_OPS) for node in nodes):
        return True
    reduces = any(is_op(node, *_NORM_REDUCTIONS) for node in nodes)
    return reduces and any(is_op(node, "aten.rsqrt", "aten.sqrt", "aten.pow") for node in nodes)


def _fold(graph: fx.Graph, kind: LeafKind, path: str, module: nn.Module, nodes: Sequence[Node]) -> None:
    inside = set(nodes)
    call = next((node for node in nodes if is_op(node, EXPERTS_OP)), None)
    if call is not None:
        arguments, output = inputs(call), call
        inside = {call}
    else:
        outside = dict.fromkeys(
            n for node in nodes for n in inputs(node) if n not in inside and not _owned(n, path, module)
        )
        tensors = [n for n in outside if rank(n) >= 0]
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        if len(tensors) != 1 or len(outputs) != 1:
            return  # not a function of one tensor: stays as traced
        arguments, output = (tensors[0],), outputs[0]
    with graph.inserting_before(output):
        raised = graph.create_node("call_module", path, tuple(arguments), name=path.replace(".", "_"))
    raised.meta = {key: val for key, val in output.meta.items() if key in ("val", "tensor_meta")}
    annotate(raised, need(output, Scope))
    annotate(raised, _leaf(kind, path, module))
    output.replace_all_uses_with(raised)


def _mark_bare_linears(graph: fx.Graph, model: PreTrainedModel) -> None:
    for node in graph.nodes:
        if not is_op(node, "aten.linear"):
            continue
        weight = tensor_arg(node, 1)
        while weight is not None and is_op(weight, *_CASTS):  # routers of half-precision models compute in float32
            weight = tensor_arg(weight, 0)
        if weight is not None and weight.op == "get_attr":
            path, _, _ = str(weight.target).rpartition(".")
            rows, columns = value(weight).shape
            class_name = type(model.get_submodule(path)).__name__
            bias = len(node.args) > 2 and node.args[2] is not None
            parameters = int(rows * columns)
            annotate(node, Leaf(LeafKind.BARE_LINEAR, path, class_name, parameters, int(columns), int(rows), bias))


def _owned(node: Node, path: str, module: nn.Module) -> bool:
    """Whether a node reads a parameter or buffer of this module (a tied one counts)."""
    if node.op != "get_attr":
        return False
    if str(node.target).startswith(f"{path}."):
        return True
    # A tied weight is exported once, under the path of its first owner: linears and embeddings own their attributes.
    return isinstance(module, (nn.Linear, nn.Embedding))


def _leaf(kind: LeafKind, path: str, module: nn.Module) -> Leaf:
    parameters = sum(p.numel() for p in module.parameters())
    bias = getattr(module, "bias", None) is not None
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return Leaf(kind, path, name, parameters, module.in_features, module.out_features, bias)
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return Leaf(kind, path, name, parameters, int(rows), int(columns), bias)
    return Leaf(kind, path, name, parameters)
