"""Every way to break the rules of a stage: one edit of a legal graph each, and what the verifier says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from qcompiler.ir.annotations import Quant
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.spec import SPECS
from qcompiler.scheme import QuantSpec, Scheme, Strategy, preset

LAYER = "model.layers.0"
Q, K, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qko")
GATE, DOWN, HEAD, NORM = f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.down_proj", "lm_head", f"{LAYER}.input_layernorm"
ACTIVATION = f"(in module {LAYER}.mlp.act_fn)"


@dataclass(frozen=True, slots=True)
class Case:
    """One way to break `rule` and nothing else: `edit` does it and returns the node that is to blame.

    The message ends in `module` and `says`.
    """

    name: str
    rule: str
    module: str
    says: str
    stages: tuple[Stage, ...]
    edit: Callable[[Graph], fx.Node]


CASES: list[Case] = []


def breaks(
    rule: str, says: str, *, module: str, since: Stage = Stage.CAPTURED
) -> Callable[[Callable[[Graph], fx.Node]], Callable[[Graph], fx.Node]]:
    """Register an edit as a case, at every stage that has this rule (`since`: from that stage on)."""
    stages = tuple(stage for stage, rules in SPECS.items() if stage >= since and rule in {r.name for r in rules})

    def register(edit: Callable[[Graph], fx.Node]) -> Callable[[Graph], fx.Node]:
        CASES.append(Case(edit.__name__, rule, module, says, stages, edit))
        return edit

    return register


DENSE = Quant(None, "none", ("test",))
OTHER_WEIGHTS = Scheme(
    weights=QuantSpec(type="float", bits=8, strategy=Strategy.CHANNEL),
    input_activations=preset("FP8").input_activations,
)
