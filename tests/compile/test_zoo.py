"""Every family that must work, from a checkpoint to a mixed one that Transformers loads and computes alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import qcompiler
from qcompiler import Pipeline, Result
from qcompiler.errors import LegalityError
from qcompiler.report import LayerRow
from qcompiler.source import ModelSource, open_model
from tests.compile.tiny import (
    ATTENTION,
    INT4_ASYM,
    INT8,
    MLP,
    compile_tiny,
    pipeline,
    quantization,
    rule,
    save_tiny,
    stored,
    tiny_model,
)
from tests.zoo import FAMILIES

PIPELINES: dict[str, Pipeline] = {
    "integers": pipeline(
        rule({"structure": "mlp-output"}, INT8, optional=True),
        rule({"structure": ["attention-input", "attention-output", "mlp-input"]}, INT4_ASYM, optional=True),
        legalize={"conv1d": "dense"},
        scales="mse",
    ),
    "floats": pipeline(
        rule(MLP, "FP8", optional=True),
        rule(ATTENTION, "FP8_DYNAMIC", optional=True),
        legalize={"conv1d": "dense"},
    ),
}
"""Two mixed pipelines: weights alone, and static beside dynamic activations."""

WITH_EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "glm4_moe", "llama4_text")
# A block of dense experts beside packed integers loads in no Transformers; the table of refusals shows it once.
FLOATS_ALONE = (*WITH_EXPERTS, "falcon")

CASES = [
    (family, "floats" if family in FLOATS_ALONE or number % 2 else "integers") for number, family in enumerate(FAMILIES)
] + [("falcon", "integers"), ("gpt_bigcode", "integers"), ("mixtral", "integers")]

REFUSED = {
    ("gpt2", "integers"): "no linear is quantized: every one is dense, and Conv1D layers cannot be otherwise",
    ("gpt2", "floats"): "no linear is quantized: every one is dense, and Conv1D layers cannot be otherwise",
    ("mixtral", "integers"): "dense experts do not load beside packed linears: they would stay at random",
    # Its class initializes linears by their weight, and a packed linear has none.
    ("falcon", "integers"): "AttributeError: 'FalconLinear' object has no attribute 'weight'",
    ("gpt_bigcode", "integers"): "AttributeError: 'Linear' object has no attribute 'weight'",
    # Where compressed-tensors is at work, Transformers exchanges the experts for a list of MLPs, and reads no others.
    ("llama4_text", "floats"): "missing_keys: ['model.layers.0.feed_forward.experts.0.down_proj.weight'",
}
"""What Transformers cannot load, refused before a weight is read, and words of the message that says so."""


@dataclass(frozen=True)
class Case:
    """One family compiled once, for all tests that look at it. `result` is None where it was refused."""

    family: str
    kind: str
    source: Path
    output: Path
    result: Result | None
    refused: str | None


@pytest.fixture(scope="session", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, kind = request.param
    folder = tmp_path_factory.mktemp(family)
    source = save_tiny(folder / "source", family)
    result, refused = None, None
    try:
        result = compile_tiny(source, folder / "output", PIPELINES[kind])
    except LegalityError as error:
        refused = str(error)
    return Case(family, kind, source, folder / "output", result, refused)


def test_transformers_computes_what_was_compiled_or_it_was_refused(case: Case) -> None:
    expected = REFUSED.get((case.family, case.kind))
    if expected is None:
        assert case.refused is None
        assert qcompiler.verify(case.output).difference == 0
    else:
        assert case.refused is not None, "it works: take it off the list"
        assert expected in case.refused


def test_a_linear_that_adds_its_bias_apart_is_computed_so(tmp_path: Path) -> None:
    """Falcon's rounds twice: the product, and the sum."""
    model = tiny_model("falcon", bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source")
    compile_tiny(tmp_path / "source", tmp_path / "output", PIPELINES["floats"])
    assert qcompiler.verify(tmp_path / "output").difference == 0


def test_predicted_bytes_are_those_on_disk(case: Case) -> None:
    if case.result is None:
        assert not case.output.exists()
        return
    tensors = stored(case.output)
    planned = case.result.plan.report
    with open_model(case.source) as source:
        owned = [(row, keys_of(row, source, list(tensors))) for row in planned.layers]
    for row, keys in owned:
        assert sum(tensors[key].nbytes for key in keys) == row.bytes, row.path
    listed = [key for _, keys in owned for key in keys]
    assert len(listed) == len(set(listed))
    assert sum(tensor.nbytes for tensor in tensors.values()) == planned.total_bytes


def test_the_mix_and_what_stays_dense_are_reported(case: Case) -> None:
    if case.result is None:
        return
    report = case.result.report
    schemes = {row.structure: row.scheme for row in report.layers if row.scheme}
    kinds = {row.kind for row in report.layers}
    assert schemes
    assert ("experts" in kinds) == (case.family in WITH_EXPERTS)
    assert any("blocks of experts stay dense" in note.text for note in report.notes) == ("experts" in kinds)
    assert len(set(schemes.values())) == 2 or "experts" in kinds
    assert all((row.error is not None) == (row.scheme is not None) for row in report.layers)
    routers = [row for row in report.layers if row.structure == "router"]
    assert bool(routers) == (case.family in WITH_EXPERTS)
    ignored = quantization(case.output)["ignore"]
    assert all(row.scheme is None and row.path in ignored for row in routers)  # some runtimes build them as linears


def keys_of(row: LayerRow, source: ModelSource, keys: list[str]) -> list[str]:
    """The tensors on disk that belong to a layer."""
    module = source.model.get_submodule(row.path)
    own = [f"{row.path}.{name}" for name, _ in module.named_parameters(recurse=row.kind != "bare-linear")]
    dense = set(source.names.dense_specs(own))
    if row.scheme is None:
        return [key for key in keys if key in dense]
    (prefix,) = {key.rpartition(".")[0] for key in dense}
    return [key for key in keys if key.rpartition(".")[0] == prefix]
