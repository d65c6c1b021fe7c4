"""Every causal-LM class of the installed Transformers: captured exactly, or refused for the reason stated here.

All in float32; the families that must work are compiled, and so captured and proved, in bfloat16 by tests/compile.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from qcompiler.capture import capture_graph
from qcompiler.capture.compare import causal_logits, has_copies
from qcompiler.capture.twin import build_twin
from qcompiler.errors import CaptureError
from qcompiler.ir.annotations import Scope, need
from qcompiler.ir.fx import is_tensor, op_name
from qcompiler.ir.graph import Graph
from qcompiler.source import refuse
from tests.capture.conftest import DECODERS, Member, capture_member
from tests.capture.models import captured
from tests.zoo import FAMILIES, causal_lm_classes, default_config, left_out

REFUSED = {
    "aria_text": "its forward pass depends on the values of tensors",
    # As decoders too, these read tokens to come, in the installed Transformers.
    **dict.fromkeys(("big_bird", "megatron-bert", "rembert", "roformer"), "is not causal"),
    "cpmant": "its forward pass fixes the sequence length",
    "doge": "is not causal",  # without a padding mask Transformers hands it none at all
    "reformer": "its forward pass fixes the batch size",
    "xlnet": "is not causal",
}
"""Decoders that cannot be compiled, and words of the message that says so."""


def test_every_decoder_is_exact_or_refused_for_its_reason(member: Member) -> None:
    expected = REFUSED.get(member.model_type)
    if expected is None:
        assert member.refused is None
    else:
        assert member.refused is not None, "it works: take it off the list"
        assert expected in member.refused


def test_no_family_is_refused() -> None:
    assert not REFUSED.keys() & set(FAMILIES)
    assert set(FAMILIES) <= set(DECODERS)


Step = tuple[str, str, tuple[str, ...]]


def computation(graph: Graph) -> list[Step]:
    """What is computed, on which module, in which scope: without parameters, constants and arithmetic on sizes."""
    return [
        (node.op, op_name(node), tuple(key for key, _ in need(node, Scope).calls))
        for node in graph.nodes
        if node.op in ("call_module", "call_function") and (is_tensor(node) or node.op == "call_module")
    ]


def within(layer: str, steps: list[Step]) -> list[Step]:
    """The steps of one layer, with its path cut off their names."""
    found = []
    for op, name, keys in steps:
        inner = tuple(key.removeprefix(layer) for key in keys if f"{key}.".startswith(f"{layer}."))
        if inner:
            found.append((op, name.removeprefix(layer), inner))
    return found


def test_copied_layers_are_those_that_they_are_copies_of(member: Member) -> None:
    steps = computation(member.captured)
    for layer, traced in member.captured.like.items():
        assert within(layer, steps) == within(traced, steps) != []


@pytest.mark.parametrize("model_type", FAMILIES)
def test_copied_layers_are_what_tracing_them_gives(model_type: str) -> None:
    graph = captured(model_type)
    if has_copies(graph):
        full = capture_graph(graph.model, repeat=False)
        assert not full.like
        assert computation(full) == computation(graph)


def test_every_called_linear_is_raised(member: Member) -> None:
    graph = member.captured
    for node in graph.nodes:
        calls = need(node, Scope).calls
        if node.op == "call_function" and calls:
            assert type(graph.model.get_submodule(calls[-1][1])).forward not in (nn.Linear.forward, Conv1D.forward)


ENCODERS = [
    model_type
    for model_type in DECODERS
    if getattr(CONFIG_MAPPING[model_type](), "is_decoder", None) is False
    and model_type not in ("gpt_neox", "gpt_neox_japanese", "trocr")  # decoders whatever they are told
    and model_type not in ("reformer", "xmod")  # refuse to be built, or to run, so
]


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_that_are_not_told_to_decode_are_refused(model_type: str) -> None:
    with pytest.raises(CaptureError, match=r"is not causal: a later token changes an earlier logit[\s\S]*is_decoder"):
        causal_logits(build_twin(CONFIG_MAPPING[model_type]()), torch.arange(3, 42).view(3, 13))


OTHERS = {model_type: reason for model_type, _ in causal_lm_classes() if (reason := left_out(model_type))}
SAYS = {
    "encoder-decoder": "is an encoder-decoder",
    "composite": "multimodal or composite|is not the config of one decoder|does not say how many layers it has",
    "recurrent": "state-space, recurrent or convolutional layers",
    "no attention": "state-space, recurrent or convolutional layers",
}
"""What is said of a class that is no decoder, by how the zoo's reason begins."""

ODD = {
    "inkling_text": "logits differ by up to [0-9.]+e-0[78]$",  # convolutions: rounding alone
    "lfm2_moe": "no tiny model of Lfm2MoeConfig",  # its default config has no layer types
    "lfm2": None,  # short convolutions: exact
    **dict.fromkeys(("musicgen", "musicgen_melody"), SAYS["encoder-decoder"]),  # of parts that are models
}


def refusal(model_type: str) -> str | None:
    """Why a class of the mapping is not compiled, from the first of the stages that refuses it."""
    try:
        refuse(default_config(model_type))
        return capture_member(model_type).refused
    except CaptureError as error:
        return error.message


@pytest.mark.parametrize("model_type", OTHERS)
def test_what_is_no_decoder_is_refused_and_says_so(model_type: str) -> None:
    said = refusal(model_type)
    start = next(start for start in SAYS if OTHERS[model_type].startswith(start))
    expected = ODD.get(model_type, SAYS[start])
    assert (said is None) if expected is None else (said is not None and re.search(expected, said)), said
