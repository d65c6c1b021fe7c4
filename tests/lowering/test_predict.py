"""Bytes predicted from a config alone, and from headers, against those that a compilation writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import qcompiler
from qcompiler.checkpoints.reader import CheckpointReader
from qcompiler.report import LayerRow, Report
from tests.compile.tiny import (
    ATTENTION,
    EVERYWHERE,
    INT4_ASYM,
    MLP,
    compile_tiny,
    pipeline,
    rule,
    save_tiny,
    stored,
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
    result = compile_tiny(source, tmp_path / "output", chosen, rows=4)
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


def unread(self: CheckpointReader, key: str, *rest: object) -> None:
    raise AssertionError(f"{key} was read")


def test_a_plan_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "source", "mixtral")

    for reading in ("read", "bytes_at", "copy_bytes", "same_bytes"):
        monkeypatch.setattr(CheckpointReader, reading, unread)
    report = qcompiler.plan(source, pipeline(rule(ATTENTION, "FP8"))).report
    assert report.total_bytes < report.dense_total_bytes
    assert all(row.error is None for row in report.layers)
    assert not any("stored twice" in note.text for note in report.notes)


def test_a_plan_takes_stored_duplicates_of_tied_weights_for_equal_unread_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tmp_path / "source", "llama", layers=1, tie_word_embeddings=True)
    tensors = stored(source)
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    chosen = pipeline(rule(ATTENTION, INT4_ASYM))
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointReader, "same_bytes", unread)
        planned = qcompiler.plan(source, chosen).report
    assert any("stored twice, and taken for equal" in n.text and "lm_head.weight" in n.text for n in planned.notes)
    result = qcompiler.compile(source, pipeline=chosen, output=tmp_path / "output")
    assert result.report.total_bytes == planned.total_bytes == total(result.output)
    assert not any("stored twice" in note.text for note in result.report.notes)


def test_savings_are_counted_against_the_files_whatever_the_dtype(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama", layers=1)
    chosen = pipeline(rule(ATTENTION, "FP8_DYNAMIC"))
    narrow, wide = (qcompiler.plan(source, chosen, dtype=dtype).report for dtype in ("bfloat16", "float32"))
    assert narrow.dense_total_bytes == wide.dense_total_bytes == total(source)
    assert narrow.total_bytes < wide.total_bytes
    assert [row.dense_bytes for row in narrow.layers] == [row.dense_bytes for row in wide.layers]
