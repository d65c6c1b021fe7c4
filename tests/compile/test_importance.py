"""`calibrate: {scales: importance}` weighs each layer's scale search by the inputs that the model really has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qcompiler
from qcompiler import Result
from qcompiler.numerics import quantize_weight
from qcompiler.scheme import Scheme
from tests.compile.tiny import ATTENTION, INT4_ASYM, MLP, SHORT, pipeline, rule, same, save_tiny, stored, token_rows

ROWS = token_rows()
RULES = (rule(ATTENTION, INT4_ASYM), rule(MLP, INT4_ASYM, solver="gptq"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("importance") / "source", "llama")


@pytest.fixture(scope="module")
def weighed(source: Path) -> Result:
    return qcompiler.compile(
        source,
        pipeline=pipeline(*RULES, observers={"importance": True}, scales="importance"),
        output=source.parent / "out",
        calibration=ROWS,
        sampling=SHORT,
    )


def inputs(compiled: Path) -> dict[str, Tensor]:
    """What enters the linears of the first layer, by running what was compiled: each sees those before it rounded."""
    model = AutoModelForCausalLM.from_pretrained(compiled)
    seen: dict[str, list[Tensor]] = {}
    for path, module in model.named_modules():
        if path.startswith("model.layers.0.") and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, path=path: seen.setdefault(path, []).append(args[0].flatten(0, 1))
            )
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row["input_ids"]]))
    return {path: torch.cat(rows) for path, rows in seen.items()}


def test_scales_are_those_of_a_search_weighed_by_the_inputs(source: Path, weighed: Result) -> None:
    found, dense, seen = stored(weighed.output), stored(source), inputs(weighed.output)
    spec = Scheme.model_validate(INT4_ASYM).weights
    assert len(seen) == 7
    plain = 0
    for path, x in seen.items():
        weight = dense[f"{path}.weight"]
        importance = x.float().square().mean(0)
        q = quantize_weight(weight, spec, scales="mse", scale_dtype=torch.bfloat16, importance=importance)
        assert (q.scale == found[f"{path}.weight_scale"]).float().mean() > 0.99, path  # sums in another order
        plain += same(quantize_weight(weight, spec, scales="mse", scale_dtype=torch.bfloat16).scale, q.scale)
    assert plain == 0


def test_both_solvers_start_from_them(weighed: Result) -> None:
    solvers = {row.path: row.output_error is not None for row in weighed.report.layers if row.scheme}
    assert {path: "mlp" in path for path in solvers} == solvers
