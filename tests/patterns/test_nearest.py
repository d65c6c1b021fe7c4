"""What a model nearly has, in words: structures that no linear has, and linears that have none."""

from __future__ import annotations

from pathlib import Path

import qcompiler
from qcompiler.ir.annotations import Structure
from qcompiler.patterns.nearest import nearest, unplaced, why_no_structure
from qcompiler.patterns.transformer import EAGER_ATTENTION, FUSED_ATTENTION, GATED_PRODUCT
from tests.capture.models import captured
from tests.compile.tiny import EVERYWHERE, pipeline, rule


def test_the_nearest_miss_comes_first_and_layers_that_miss_alike_are_told_once() -> None:
    words = nearest(captured("llama"), (EAGER_ATTENTION, GATED_PRODUCT), count=9)
    first, *more = words.split("; ")
    assert first.startswith("gated product: ")
    assert not any("in model.layers.1" in word for word in (first, *more))


def test_what_is_not_there_at_all_is_said() -> None:
    assert nearest(captured("gpt_oss"), (FUSED_ATTENTION,)) == "the model has no aten.scaled_dot_product_attention"
    assert nearest(captured("llama"), (FUSED_ATTENTION,)) == "whatever could be one has another place"


def test_structures_that_are_there_need_no_words() -> None:
    assert why_no_structure(captured("deepseek_v3"), [s for s in Structure if s is not Structure.EMBEDDING]) == ""
    assert why_no_structure(captured("mixtral"), [Structure.MLP_OUTPUT, Structure.ATTENTION_INPUT]) == (
        "no mlp-output, nearest: whatever could be one has another place"
    )


def test_linears_of_layers_without_a_structure_are_told_by_kind_with_what_they_nearly_are() -> None:
    assert unplaced(captured("llama")) == []
    notes = unplaced(captured("gemma3n_text"))
    (torn,) = (note for note in notes if "altup.modality_router" in note)
    assert torn.startswith("no structure was found for model.layers.0.altup.modality_router and 2 more like it: ")
    assert torn.endswith("it runs several times, in places of different structure")
    (gate,) = (note for note in notes if note.startswith("no structure was found for model.layers.0.per_layer_input"))
    assert (
        "nearest: mlp: what it reads is made of linears that have another place, model.layers.0.mlp.down_proj" in gate
    )


def test_a_plan_says_so(tmp_path: Path) -> None:
    captured("gemma3n_text").model.config.save_pretrained(tmp_path)
    report = qcompiler.plan(tmp_path, pipeline(rule(EVERYWHERE, "FP8_DYNAMIC"))).report
    assert set(unplaced(captured("gemma3n_text"))) <= {note.text for note in report.notes if note.kind == "info"}
