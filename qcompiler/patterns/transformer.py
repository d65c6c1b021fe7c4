"""The patterns that say where a linear stands in a transformer. No name of a module or a model occurs in them."""

from __future__ import annotations

from qcompiler.ir.annotations import Leaf, LeafKind, need
from qcompiler.ir.fx import is_op
from qcompiler.patterns.language import Check, Match, Pattern, Test, Walk, leaf, op
from qcompiler.patterns.vocabulary import (
    ACTIVATION,
    ARITHMETIC,
    LAYOUT,
    MATMUL,
    POINTWISE,
    ROTARY,
    ROUTING,
    SDPA,
    SOFTMAX,
    source,
)

LINEAR = leaf(LeafKind.LINEAR, LeafKind.CONV1D)
ANY_LINEAR = leaf(LeafKind.LINEAR, LeafKind.CONV1D, LeafKind.BARE_LINEAR)
NORM = frozenset({LeafKind.NORM})

FUSED_ATTENTION = Pattern(
    "attention (one operation)",
    anchor=op(SDPA),
    parts=(
        Walk("query", "back", operand=0, through=ROTARY, through_leaves=NORM, to=LINEAR, many=True),
        Walk("key", "back", operand=1, through=ROTARY, through_leaves=NORM, to=LINEAR, many=True),
        Walk("value", "back", operand=2, through=ROTARY, through_leaves=NORM, to=LINEAR, many=True),
    ),
)

_SCORES = (
    LAYOUT | ARITHMETIC | {"aten.tanh", "aten.masked_fill", "aten.where", "aten.max", "aten.maximum", "aten.baddbmm"}
)

EAGER_ATTENTION = Pattern(
    "attention (matmul, softmax, matmul)",
    anchor=op(*MATMUL),
    parts=(
        Walk("softmax", "back", operand=0, through=LAYOUT | {"aten.mul"}, to=op(*SOFTMAX)),
        Walk("scores", "back", start="softmax", operand=0, through=_SCORES - {"aten.baddbmm"}, to=op(*MATMUL)),
        Walk("query", "back", start="scores", through=ROTARY, through_leaves=NORM, to=LINEAR, many=True),
        Walk("value", "back", operand=1, through=ROTARY, through_leaves=NORM, to=LINEAR, many=True),
    ),
)

ATTENTIONS = (FUSED_ATTENTION, EAGER_ATTENTION)

ATTENTION_OUTPUT = Walk("output", "forward", through=LAYOUT | POINTWISE, through_leaves=NORM, to=LINEAR)
"""From an attention to the linear that mixes its heads."""

OUTPUT_GATE = Walk(
    "gate", "back", start="output", operand=0, through=LAYOUT | POINTWISE, through_leaves=NORM, to=LINEAR, many=True
)
"""From that linear back to those that an attention's output is multiplied with."""

LOW_RANK = Pattern(
    "low-rank projection",
    anchor=LINEAR,
    parts=(Walk("down", "back", operand=0, through=LAYOUT, through_leaves=NORM, to=LINEAR),),
)
"""A linear that reads another's output, at most normalized: multi-head latent attention's two steps."""

GATED_PRODUCT = Pattern(
    "gated product",
    anchor=op("aten.mul", "operator.mul"),
    parts=(
        Walk("left", "back", operand=0, through=POINTWISE | LAYOUT, to=LINEAR),
        Walk("right", "back", operand=1, through=POINTWISE | LAYOUT, to=LINEAR),
        Check("the factors come from two linears", lambda m: m.one("left") is not m.one("right")),
        Check("both read the same tensor", lambda m: source(m.one("left")) is source(m.one("right"))),
        Check("both are equally wide", lambda m: _width(m, "left") == _width(m, "right")),
    ),
)


def _width(match: Match, name: str) -> int:
    return need(match.one(name), Leaf).out_features


def _activated(match: Match) -> bool:
    """Whether a non-linearity or a product stands between the MLP's inputs and its output linear."""
    seen, todo = set(match["inputs"]), list(match.anchor.all_input_nodes)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_op(node, *ACTIVATION) or (is_op(node, "aten.mul") and len(node.all_input_nodes) == 2):
            return True
        todo.extend(node.all_input_nodes)
    return False


MLP = Pattern(
    "mlp",
    anchor=LINEAR,
    parts=(
        Walk("inputs", "back", operand=0, through=POINTWISE | LAYOUT, through_leaves=NORM, to=LINEAR, many=True),
        Check("an activation stands between", _activated),
    ),
)
"""linear(s) -> activation, product -> linear. The anchor is the output linear."""

ROUTED_EXPERTS = Pattern(
    "routed experts",
    anchor=leaf(LeafKind.EXPERTS),
    parts=(Walk("router", "back", operand=(1, 2), through=ROUTING, to=ANY_LINEAR, many=True),),
)

TOP_K = Pattern(
    "top-k routing",
    anchor=ANY_LINEAR,
    parts=(Walk("choice", "forward", through=ROUTING - {"aten.topk"}, to=op("aten.topk"), many=True),),
)
"""A linear whose scores are ranked."""

SCALAR_GATE = Pattern(
    "scalar gate",
    anchor=Test("a linear with one output", lambda node: LINEAR.holds(node) and need(node, Leaf).out_features == 1),
    parts=(Walk("sigmoid", "forward", through=LAYOUT, to=op("aten.sigmoid")),),
)
"""What weighs a shared expert: it routes, it does not carry."""

LM_HEAD = Pattern(
    "lm head",
    anchor=Test("the output", lambda node: node.op == "output"),
    parts=(Walk("head", "back", through=LAYOUT | POINTWISE, to=LINEAR),),
)
