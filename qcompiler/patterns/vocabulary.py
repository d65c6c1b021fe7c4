"""Sets of operations that patterns walk through, and the tensor a linear really reads."""

from __future__ import annotations

from qcompiler.ir.fx import Node, is_op, last_dim, tensor_arg

RESHAPE = frozenset(
    {
        "aten.view",
        "aten.reshape",
        "aten.contiguous",
        "aten.clone",
        "aten.flatten",
        "aten.unflatten",
        "aten._unsafe_view",
        "aten.view_as",
        "aten.reshape_as",
    }
)
"""Operations that keep the elements and their order."""

LAYOUT = RESHAPE | {
    "aten.transpose",
    "aten.swapaxes",
    "aten.swapdims",
    "aten.movedim",
    "aten.moveaxis",
    "aten.permute",
    "aten.t",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.expand",
    "aten.expand_as",
    "aten.broadcast_to",
    "aten.repeat",
    "aten.repeat_interleave",
    "aten.tile",
    "aten.slice",
    "aten.narrow",
    "aten.select",
    "aten.slice_scatter",
    "aten.select_scatter",
    "aten.copy",
    "aten.split",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.tensor_split",
    "aten.unbind",
    "aten.cat",
    "aten.concat",
    "aten.concatenate",
    "aten.stack",
    "aten.pad",
    "aten.constant_pad_nd",
    "aten.index",
    "aten.index_select",
    "aten.to",
    "aten._to_copy",
    "aten.type_as",
    "operator.getitem",
}
"""Operations that move elements about: views, splits, joins and casts."""

ARITHMETIC = frozenset(
    {
        f"aten.{name}{tail}"
        for name in ("mul", "add", "sub", "div", "neg", "rsub", "pow", "square")
        for tail in ("", "_")
    }
    | {f"operator.{name}" for name in ("mul", "add", "sub", "truediv", "neg", "pow")}
)

ACTIVATION = frozenset(
    f"aten.{name}{tail}"
    for name in (
        *("silu", "gelu", "relu", "relu6", "sigmoid", "tanh", "softplus", "mish", "hardswish", "hardtanh", "elu"),
        *("leaky_relu", "erf", "exp", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "square", "pow"),
        *("where", "threshold", "celu", "selu", "log_sigmoid"),
    )
    for tail in ("", "_")
)
"""Elementwise non-linearities, whole or spelled out in their own arithmetic."""

POINTWISE = ARITHMETIC | ACTIVATION

ROTARY = LAYOUT | ARITHMETIC | {"aten.view_as_complex", "aten.view_as_real", "aten.polar", "aten.clamp", "aten.clamp_"}
"""What stands between a q/k/v projection and attention: heads split off, rotary embedding, scaling, clipping."""

SOFTMAX = ("aten.softmax", "aten._softmax")
MATMUL = ("aten.matmul", "aten.bmm", "aten.baddbmm", "aten.mm")
SDPA = "aten.scaled_dot_product_attention"

ROUTING = (
    POINTWISE
    | LAYOUT
    | {
        *SOFTMAX,
        "aten.topk",
        "aten.sort",
        "aten.argsort",
        "aten.gather",
        "aten.scatter",
        "aten.scatter_",
        "aten.sum",
        "aten.masked_fill",
        "aten.masked_fill_",
        "aten.zeros_like",
        "aten.max",
        "aten.one_hot",
        "aten.logsumexp",
        "aten.abs",
        "aten.sqrt",
        "aten.scatter_add",
    }
)
"""How a router's scores become expert indices and weights."""


def source(node: Node) -> Node:
    """The tensor that a leaf reads, seen through reshapes that keep its features in the last dimension."""
    current = tensor_arg(node, 0)
    assert current is not None, f"%{node.name} reads no tensor"
    while is_op(current, *RESHAPE):
        before = tensor_arg(current, 0)
        if before is None or last_dim(before) is None or last_dim(before) != last_dim(current):
            break
        current = before
    return current
