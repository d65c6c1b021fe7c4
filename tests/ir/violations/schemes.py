"""Edits that break the rules of schemes."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from qcompiler.ir.annotations import Quant
from qcompiler.ir.graph import Graph
from tests.ir.graphs import again, changed, leaf, requant
from tests.ir.violations.case import DENSE, HEAD, NORM, OTHER_WEIGHTS, OUT, K, breaks


@breaks("quant-on-linear", "only linears are quantized, and this is a norm", module=f"(module {NORM})")
def a_norm_has_a_scheme(graph: Graph) -> fx.Node:
    return requant(leaf(graph, NORM), DENSE)


@breaks("quant-has-because", "it does not say which pass and rule decided its scheme", module=f"(module {OUT})")
def a_scheme_has_no_reason(graph: Graph) -> fx.Node:
    return changed(leaf(graph, OUT), Quant, because=())


@breaks("quant-has-solver", "it has a scheme, but no solver that rounds its weight", module=f"(module {OUT})")
def a_scheme_has_no_solver(graph: Graph) -> fx.Node:
    return changed(leaf(graph, OUT), Quant, solver="none")


@breaks("quant-has-solver", "it stays dense, but solver 'rtn' is to round its weight", module=f"(module {HEAD})")
def a_dense_linear_has_a_solver(graph: Graph) -> fx.Node:
    return requant(leaf(graph, HEAD), replace(DENSE, solver="rtn"))


@breaks(
    "one-scheme-per-module",
    f"module {OUT}: w:fp8/channel a:fp8/tensor here, but w:fp8/tensor a:fp8/tensor at %l0.self_attn.o_proj",
    module=f"(module {OUT})",
)
def a_module_runs_twice_under_two_schemes(graph: Graph) -> fx.Node:
    return changed(again(graph, leaf(graph, OUT)), Quant, scheme=OTHER_WEIGHTS)


@breaks(
    "one-scheme-per-fusion-group",
    "fusion group l0.qkv: w:fp8/channel a:fp8/tensor here, but w:fp8/tensor a:fp8/tensor at %l0.self_attn.q_proj",
    module=f"(module {K})",
)
def fused_linears_have_two_schemes(graph: Graph) -> fx.Node:
    return changed(leaf(graph, K), Quant, scheme=OTHER_WEIGHTS)
