"""Annotations: frozen, one of each kind on a node, and never overwritten unread."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from torch import fx

from qcompiler.errors import VerificationError
from qcompiler.ir.annotations import (
    Leaf,
    LeafKind,
    Observer,
    Quant,
    Role,
    Scope,
    Structure,
    annotate,
    get,
    get_quant,
    need,
    set_quant,
)
from qcompiler.scheme import QuantSpec, Strategy, preset

SPEC = QuantSpec(bits=8, strategy=Strategy.TENSOR)
EVERY = (
    Leaf(LeafKind.LINEAR, "a.b", "Linear", 12, 3, 4),
    Scope((("a", "a"),)),
    Role(Structure.MLP_INPUT, 0, "l0.mlp-input", None, "test"),
    Quant(preset("W4A16"), "rtn", ("assign: rule 1",)),
    Observer("a", "minmax", SPEC, "input", ("a.b",), ("test",)),
)
DENSE = Quant(None, "none", ("assign: ignore 1",))


@pytest.fixture
def node() -> fx.Node:
    return fx.Graph().placeholder("x")


def test_a_node_holds_one_annotation_of_each_kind(node: fx.Node) -> None:
    for annotation in EVERY:
        annotate(node, annotation)
    assert [get(node, type(annotation)) for annotation in EVERY] == list(EVERY)


@pytest.mark.parametrize("annotation", EVERY, ids=lambda annotation: type(annotation).__name__)
def test_annotations_are_frozen_slotted_and_hashable(annotation: Leaf) -> None:
    for field in fields(annotation):
        with pytest.raises(FrozenInstanceError):
            setattr(annotation, field.name, None)
    assert not hasattr(annotation, "__dict__")
    assert len({annotation, copy.deepcopy(annotation)}) == 1


def test_what_is_not_there_is_none_or_an_error_that_names_node_and_kind(node: fx.Node) -> None:
    assert get(node, Role) is None
    with pytest.raises(VerificationError, match="node %x has no Role annotation"):
        need(node, Role)


def test_a_second_annotation_of_a_kind_is_refused_and_the_first_stays(node: fx.Node) -> None:
    set_quant(node, EVERY[3])
    with pytest.raises(
        VerificationError, match=r"%x is already annotated with Quant\(.*silently become Quant"
    ) as error:
        set_quant(node, DENSE)
    assert "pass it as replacing=" in str(error.value)
    assert get_quant(node) == EVERY[3]


def test_who_names_what_is_there_may_replace_it(node: fx.Node) -> None:
    set_quant(node, EVERY[3])
    set_quant(node, DENSE, replacing=EVERY[3])
    assert get_quant(node) == DENSE


@pytest.mark.parametrize(
    ("present", "says"),
    [(None, "%x has no Quant annotation; it would"), (EVERY[3], "%x is already annotated with Quant")],
    ids=["nothing", "another"],
)
def test_who_names_what_is_not_there_may_not(node: fx.Node, present: Quant | None, says: str) -> None:
    if present is not None:
        set_quant(node, present)
    with pytest.raises(VerificationError, match=says):
        set_quant(node, DENSE, replacing=replace(EVERY[3], solver="gptq"))
    assert get_quant(node) == present


def test_an_annotation_stays_on_its_node_when_a_copy_of_the_graph_is_annotated(node: fx.Node) -> None:
    annotate(node, EVERY[0])
    twin = next(iter(copy.deepcopy(node.graph).nodes))
    assert get(twin, Leaf) == EVERY[0]
    set_quant(twin, DENSE)
    annotate(twin, replace(EVERY[0], path="other"), replacing=EVERY[0])
    assert (get_quant(node), get(node, Leaf)) == (None, EVERY[0])


@pytest.mark.parametrize("kind", LeafKind)
def test_linears_are_those_that_have_a_module_of_their_own(kind: LeafKind) -> None:
    named = {LeafKind.LINEAR, LeafKind.CONV1D}
    assert Leaf(kind, "a", "A", 1).is_linear == (kind in named)
