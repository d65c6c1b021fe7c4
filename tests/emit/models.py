"""Sites of small models for the emission tests."""

from __future__ import annotations

from collections.abc import Callable

from qcompiler.emit.sites import Site
from qcompiler.scheme import Scheme

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
Rule = Callable[[str], Scheme | None]


def llama(rule: Rule, layers: int = 4) -> list[Site]:
    """A dense decoder; `rule` gives each name its scheme."""
    names = [
        f"model.layers.{layer}.{block}.{leaf}"
        for layer in range(layers)
        for block, leaves in (("self_attn", ATTENTION), ("mlp", MLP))
        for leaf in leaves
    ]
    sites = [Site(name, 256, 256, rule(name)) for name in names]
    return [*sites, Site("lm_head", 1024, 256, rule("lm_head"), structure="lm-head")]


def mixture(rule: Rule, layers: int = 3, experts: int = 3) -> list[Site]:
    """A mixture of experts whose first layer is dense and whose others have a router and a shared expert."""
    sites: list[Site] = []
    for layer in range(layers):
        base = f"model.layers.{layer}"
        sites += [Site(f"{base}.self_attn.{leaf}", 256, 256, rule(f"{base}.self_attn.{leaf}")) for leaf in ATTENTION]
        if layer == 0:
            sites += [Site(f"{base}.mlp.{leaf}", 256, 256, rule(f"{base}.mlp.{leaf}")) for leaf in MLP]
            continue
        sites.append(Site(f"{base}.mlp.gate", experts, 256, rule(f"{base}.mlp.gate"), structure="router"))
        for leaf in MLP:
            shared = f"{base}.mlp.shared_experts.{leaf}"
            sites.append(Site(shared, 256, 256, rule(shared)))
        for expert in range(experts):
            names = [f"{base}.mlp.experts.{expert}.{leaf}" for leaf in MLP]
            sites += [Site(n, 256, 256, rule(n), structure="experts", kind="experts") for n in names]
    return [*sites, Site("lm_head", 1024, 256, rule("lm_head"), structure="lm-head")]
