"""What a check says to do mends what it found, and two findings of one cause do not say opposite things."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qcompiler.check.findings import CheckReport, Severity
from tests.check.checkpoints import DOWN, Edited
from tests.check.conftest import Base, Check
from tests.check.number_traps import activations_without_weights, floats_of_four_bits_that_are_not_packed
from tests.check.tensor_traps import floats_that_the_config_calls_integers, integers_that_the_config_calls_floats
from tests.check.traps import give_zero_points, quantize_the_embedding


def mends(report: CheckReport) -> set[str]:
    """Of errors."""
    return {finding.mend for finding in report.of(Severity.ERROR)}


def test_zero_points_that_mean_something_are_not_to_be_removed(base: Base, checked: Check) -> None:
    edited = base("packed")
    give_zero_points(edited, DOWN)
    assert mends(checked(edited)) == {"remove it, or write symmetric: false"}
    edited.change(f"{DOWN}.weight_zero_point", lambda words: words + 1)
    assert mends(checked(edited)) == {"write symmetric: false"}


def test_a_packed_embedding_is_to_be_stored_dense(base: Base, checked: Check) -> None:
    edited = base("packed")
    dense = edited.tensors["model.embed_tokens.weight"]
    quantize_the_embedding(edited)
    edited.group()["targets"].append("Embedding")
    assert mends(checked(edited)) == {
        "store it dense, or serve it where it is read: SGLang has no quantized embeddings",
        "store it dense: packed, it serves vLLM alone",
    }
    edited.tensors = {key: value for key, value in edited.tensors.items() if "embed_tokens" not in key}
    edited.tensors["model.embed_tokens.weight"] = dense
    assert mends(checked(edited)) == {
        "add model.embed_tokens to ignore, or write the target so that it takes linears alone"
    }
    edited.quantization["ignore"].append("model.embed_tokens")
    assert checked(edited).ok


def test_a_group_without_weights_that_takes_quantized_layers_is_to_be_given_them(base: Base, checked: Check) -> None:
    edited = base("mixed")
    activations_without_weights(edited)
    report = checked(edited)
    told = {(f.code, f.layer): f for f in report.of(Severity.ERROR)}
    assert "AttributeError" in told["group-invalid", "(model)"].message
    assert "group group_1 takes it and has no weights" in told["stored-quantized", DOWN].message
    assert told["stored-quantized", DOWN].mend == "give group group_1 its weights"


def test_a_layer_that_no_target_takes_is_to_be_given_one(base: Base, checked: Check) -> None:
    edited = base("mixed")
    del edited.groups["group_1"]
    assert "add it to a target, or take it out of ignore" in mends(checked(edited))


def of_wide_groups(edited: Edited) -> None:
    edited.group()["weights"] |= {"type": "float", "strategy": "group", "group_size": 64}


def mx_of_small_groups(edited: Edited) -> None:
    edited.group()["weights"] |= {"type": "float", "scale_dtype": "torch.uint8"}


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("channel", floats_of_four_bits_that_are_not_packed),
        ("packed", of_wide_groups),
        ("packed", mx_of_small_groups),
    ],
)
def test_floats_of_four_bits_are_told_which_groups_they_have(
    name: str, edit: Callable[[Edited], None], base: Base, checked: Check
) -> None:
    edited = base(name)
    edit(edited)
    (finding,) = (f for f in checked(edited).findings if f.code == "format-unread")
    assert "4-bit floats have groups of 16 (NVFP4, strategy tensor_group) or of 32" in finding.message


@pytest.mark.parametrize(
    ("name", "edit"),
    [("channel", floats_that_the_config_calls_integers), ("mixed", integers_that_the_config_calls_floats)],
)
def test_a_format_that_fits_the_codes_is_not_to_be_changed_where_the_type_is_wrong(
    name: str, edit: Callable[[Edited], None], base: Base, checked: Check
) -> None:
    edited = base(name)
    edit(edited)
    codes = {finding.code for finding in checked(edited).findings}
    assert "tensor-dtype" in codes
    assert "format-untidy" not in codes
