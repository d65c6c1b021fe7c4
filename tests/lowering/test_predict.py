"""Bytes predicted from a config alone, and from headers, against those that a compilation writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import qcompiler
from qcompiler.report import LayerRow, Report
from tests.compile.tiny import (
    ATTENTION,
    EVERYWHERE,
    INT4_ASYM,
    MLP,
    SHORT,
    pipeline,
    rule,
    save_tiny,
    stored,
    token_rows,
)

HEAD = {"structure": "lm-head"}

CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "untied": ("llama", {}, pipeline(rule(EVERYWHERE, INT4_ASYM))),
    "tied": ("llama", {"tie_word_embeddings": True}, pipeline(rule(EVERYWHERE, INT4_ASYM))),
    "a head that comes untied": (
        "llama",
        {"tie_word_embeddings": True},
        pipeline(rule(EVERYWHERE, "FP8"), rule(HEAD, INT4_ASYM)),
    ),
    "biases and dense layers": ("qwen2", {}, pipeline(rule({**ATTENTION, "layers": 1}, "NVFP4"))),
    "experts and routers": ("glm4_moe", {}, pipeline(rule(ATTENTION, "FP8"), rule(MLP, "FP8_DYNAMIC"))),
    "merged experts with biases": ("gpt_oss", {}, pipeline(rule(ATTENTION, "FP8_DYNAMIC"))),
    "a cache per tensor": ("mistral", {}, pipeline(rule(MLP, INT4_ASYM), kv_cache={})),
    "a cache per head": ("mistral", {}, pipeline(rule(MLP, INT4_ASYM), kv_cache={"strategy": "attn_head"})),
}


@pytest.mark.parametrize("case", CASES)
def test_a_config_alone_predicts_every_byte(case: str, tmp_path: Path) -> None:
    family, said, chosen = CASES[case]
    source = save_tiny(tmp_path / "source", family, **said)
    bare = tmp_path / "config"
    bare.mkdir()
    shutil.copy(source / "config.json", bare)
    planned = qcompiler.plan(bare, chosen).report
    result = qcompiler.compile(
        source, pipeline=chosen, output=tmp_path / "output", calibration=token_rows(4), sampling=SHORT
    )
    written = stored(result.output)
    assert planned.total_bytes == sum(tensor.nbytes for tensor in written.values())
    assert [numbers(row) for row in planned.layers] == [numbers(row) for row in result.report.layers]
    assert planned.dense_total_bytes == result.report.dense_total_bytes == total(source)
    assert any("no weight files" in note.text for note in planned.notes)


def total(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in stored(folder).values())


def numbers(row: LayerRow) -> tuple[object, ...]:
    return (row.path, row.scheme, row.format, row.shape, row.bytes, row.dense_bytes, row.bits_per_weight)


def rows(report: Report, **wanted: object) -> list[LayerRow]:
    return [row for row in report.layers if all(getattr(row, key) == value for key, value in wanted.items())]


def test_bits_per_weight_count_scales_zero_points_and_shapes(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    report = qcompiler.plan(
        source,
        pipeline(
            rule({"structure": "attention-input"}, INT4_ASYM),
            rule({"structure": "attention-output"}, "FP8"),
            rule({"structure": "mlp-input"}, "NVFP4A16"),
        ),
    ).report
    codes, scales, zeros, shape = 4, 16 / 16, 4 / 16, 128 / 64**2
    assert rows(report, structure="attention-input")[0].bits_per_weight == codes + scales + zeros + shape
    assert rows(report, structure="attention-output")[0].bits_per_weight == 8 + (16 + 16) / 64**2
    assert rows(report, structure="mlp-input")[0].bits_per_weight == 4 + 8 / 16 + 32 / (176 * 64)
    assert rows(report, structure="mlp-output")[0].bits_per_weight == 16


def test_dense_rows_say_why_and_what_they_cost(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "glm4_moe")
    chosen = pipeline(rule({**ATTENTION, "layers": 0}, "FP8_DYNAMIC"), ignore=[HEAD])
    report = qcompiler.plan(source, chosen).report
    (experts,) = rows(report, kind="experts")
    assert (experts.scheme, experts.because) == (None, "blocks of experts are not quantized")
    expert_keys = [key for key in stored(source) if ".experts." in key]
    assert experts.bytes == sum(stored(source)[key].nbytes for key in expert_keys) > 0
    (router,) = rows(report, structure="router")
    assert router.because == "a linear without a module of its own is not quantized"
    assert {row.because for row in rows(report, structure="lm-head")} == {"assign: ignore 1"}
    assert {row.because for row in rows(report, structure="mlp-output", layer=0)} == {"no rule selects it"}
    assert all(row.bytes == row.dense_bytes for row in rows(report, scheme=None))


def test_a_plan_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompiler.checkpoints.reader import CheckpointReader

    source = save_tiny(tmp_path / "source", "mixtral")

    def refuse(self: CheckpointReader, key: str) -> None:
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(CheckpointReader, "read", refuse)
    report = qcompiler.plan(source, pipeline(rule(ATTENTION, "FP8"))).report
    assert report.total_bytes < report.dense_total_bytes
    assert all(row.error is None for row in report.layers)
