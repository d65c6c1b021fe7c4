"""The numbers that `verify` gives on a text: divergence from a dense model, agreement, perplexity."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import qcompiler
from qcompiler import Verification
from qcompiler.data import load_evaluation
from qcompiler.demo import evaluation_text, model_path
from qcompiler.errors import DataError
from qcompiler.fidelity import Divergence, Fidelity, measure
from tests.compile.tiny import EVERYWHERE, pipeline, rule, tiny_model, token_rows

FP8_WEIGHTS = {"weights": {"type": "float", "bits": 8, "strategy": "channel"}}


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model whose linears are FP8 numbers already, what became of it, and a text of tokens."""
    folder = tmp_path_factory.mktemp("lossless")
    model = tiny_model("llama")
    with torch.no_grad():
        for linear in [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]:
            codes = linear.weight.float() / linear.weight.float().abs().amax(1, keepdim=True) * 448
            linear.weight.copy_(codes.to(torch.float8_e4m3fn).float() * 2.0**-11)
    model.save_pretrained(folder / "dense")
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in token_rows(8, 64)))
    qcompiler.compile(folder / "dense", pipeline=pipeline(rule(EVERYWHERE, FP8_WEIGHTS)), output=folder / "compiled")
    return folder


@pytest.fixture(scope="module")
def compiled_demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    names = ("w8a16", "w4a16")
    return {name: qcompiler.compile(model_path(), pipeline=name, output=folder / name).output for name in names}


def fidelity(verified: Verification) -> tuple[Fidelity, Divergence]:
    """What was measured against a reference."""
    assert verified.fidelity is not None
    assert verified.fidelity.against is not None
    return verified.fidelity, verified.fidelity.against


def test_a_model_of_the_same_weights_diverges_by_nothing(lossless: Path) -> None:
    verified = qcompiler.verify(
        lossless / "compiled", reference=lossless / "dense", text=lossless / "text.jsonl", sequence_length=32
    )
    found, against = fidelity(verified)
    assert found.tokens == 8 * 64 // 32 * 31  # a window's first token is predicted by nothing
    assert (against.kl_mean, against.kl_median, against.kl_99, against.kl_max, against.top1) == (0, 0, 0, 0, 1)
    assert found.perplexity == against.perplexity
    assert "(+0.00%)" in str(verified)
    assert "top-1 agreement 100.00%" in str(verified)


def test_a_text_without_a_reference_gives_the_perplexity_alone(lossless: Path) -> None:
    verified = qcompiler.verify(lossless / "compiled", text=lossless / "text.jsonl", sequence_length=32, sequences=3)
    assert verified.fidelity is not None
    assert verified.fidelity.against is None
    assert verified.fidelity.tokens == 3 * 31
    assert "over 93 tokens" in str(verified)
    assert "KL" not in str(verified)


def test_a_reference_without_a_text_compares_the_weights_alone(lossless: Path) -> None:
    verified = qcompiler.verify(lossless / "compiled", reference=lossless / "dense")
    assert verified.fidelity is None
    assert verified.weights is not None
    assert (verified.weights.layers, verified.weights.tensors) == (14, 7)


def test_a_text_shorter_than_a_window_is_refused(lossless: Path, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text(json.dumps({"input_ids": [3, 4, 5]}))
    with pytest.raises(DataError, match="3 tokens"):
        qcompiler.verify(lossless / "compiled", text=tmp_path / "short.jsonl", sequence_length=32)


def test_fewer_bits_diverge_more_and_the_dense_numbers_stay(compiled_demo: dict[str, Path]) -> None:
    eight, four = (
        fidelity(
            qcompiler.verify(
                compiled_demo[name], reference=model_path(), text=evaluation_text(), sequence_length=128, sequences=16
            )
        )
        for name in ("w8a16", "w4a16")
    )
    assert eight[1].perplexity == four[1].perplexity < 60
    assert 0 < eight[1].kl_mean < 0.1 * four[1].kl_mean
    assert 0.5 < four[1].top1 < eight[1].top1 < 1
    for against in (eight[1], four[1]):
        assert against.kl_median < against.kl_mean < against.kl_99 < against.kl_max
    assert abs(eight[0].perplexity / eight[1].perplexity - 1) < 0.005
    assert four[0].perplexity > four[1].perplexity


def test_divergences_are_those_of_their_definitions(compiled_demo: dict[str, Path]) -> None:
    dense = AutoModelForCausalLM.from_pretrained(model_path()).eval()
    other = AutoModelForCausalLM.from_pretrained(compiled_demo["w4a16"]).eval()
    data = load_evaluation(evaluation_text(), model_path(), sequence_length=96, vocab_size=2048, sequences=6)
    found = measure(other, dense, data.batches)
    kl, losses, same = [], [], []
    with torch.inference_mode():
        for batch in data.batches:
            wanted, got = (model(input_ids=batch.input_ids).logits[:, :-1].float() for model in (dense, other))
            pointwise = torch.nn.functional.kl_div(
                got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none"
            )
            kl.append(pointwise.sum(-1).flatten())
            same.append((wanted.argmax(-1) == got.argmax(-1)).flatten())
            labels = batch.input_ids[:, 1:].flatten()
            losses.append(torch.nn.functional.cross_entropy(got.flatten(0, 1), labels, reduction="none"))
    values = torch.cat(kl)
    assert found.against is not None
    assert found.tokens == len(values) == 6 * 95
    assert found.against.kl_mean == pytest.approx(float(values.mean()), rel=1e-4)
    assert found.against.kl_median == pytest.approx(float(values.median()), rel=1e-3)
    assert found.against.kl_max == pytest.approx(float(values.max()), rel=1e-4)
    assert found.against.kl_99 == pytest.approx(float(values.quantile(0.99)), rel=0.1)
    assert found.against.top1 == pytest.approx(float(torch.cat(same).float().mean()))
    assert found.perplexity == pytest.approx(math.exp(float(torch.cat(losses).mean())), rel=1e-4)
