"""Transforms are named as solvers are: alone or with options, and what means nothing is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from qcompiler.transforms.options import AwqOptions, SmoothQuantOptions, TransformField


class Holder(BaseModel):
    model_config = ConfigDict(extra="forbid")
    transform: TransformField = None


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("none", None),
        (None, None),
        ("awq", AwqOptions()),
        ({"awq": None}, AwqOptions()),
        (
            {"awq": {"grid": 40, "duo_scaling": "both", "clip": True}},
            AwqOptions(grid=40, duo_scaling="both", clip=True),
        ),
        ("smoothquant", SmoothQuantOptions()),
        ({"smoothquant": {"strength": 0.8}}, SmoothQuantOptions(strength=0.8)),
    ],
)
def test_a_transform_is_a_name_or_a_name_with_options_and_prints_as_one(written: Any, means: object) -> None:
    holder = Holder(transform=written)
    assert holder.transform == means
    printed = holder.model_dump()["transform"]
    assert Holder(transform=printed) == holder
    if isinstance(written, str):
        assert printed == written


def test_no_transform_is_the_default() -> None:
    assert Holder().transform is None
    assert Holder().model_dump() == {"transform": "none"}


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("akw", "unknown transform 'akw'; did you mean 'awq'"),
        ("smoothqant", "did you mean 'smoothquant'"),
        ("rotate", "known: none, awq, smoothquant"),
        ({"awq": {"n_grid": 20}}, "n_grid"),
        ({"awq": {"grid": 1}}, "greater than or equal to 2"),
        ({"awq": {"duo_scaling": "neither"}}, "'both'"),
        ({"smoothquant": {"strength": 1.5}}, "less than or equal to 1"),
        ({"awq": {}, "smoothquant": {}}, "a transform is a name"),
        (7, "a transform is a name"),
    ],
)
def test_what_means_nothing_is_refused_by_name(written: Any, says: str) -> None:
    with pytest.raises(ValidationError) as error:
        Holder(transform=written)
    assert says in str(error.value)
