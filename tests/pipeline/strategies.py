"""Random pipelines, made of the options that the installed passes have: a new option is covered unasked."""

from __future__ import annotations

import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from annotated_types import BaseMetadata
from hypothesis import reject
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from passes.legalize import TargetName
from qcompiler.ir.annotations import Structure
from qcompiler.options import options_of, tables_in
from qcompiler.pipeline import Pass, Pipeline
from qcompiler.pipeline.registry import pass_classes
from qcompiler.scheme import PRESETS, Scheme
from qcompiler.select import Select
from qcompiler.targets import target_names

TEXT = st.text(max_size=12)


def _some(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One, or a list of several: a select takes both."""
    return st.one_of(items, st.lists(items, min_size=1, max_size=3))


_GLOBS = st.one_of(TEXT, st.sampled_from(["*", "*.layers.[0-9].*", "2:10", "no"])).filter(lambda t: t[:3] != "re:")
_EXPRESSIONS = st.one_of(TEXT.map(re.escape), st.sampled_from([r".*\.(q|k)_proj$", "(?i)LM_HEAD", "[^:]{2,}: #"]))
_INDEX = st.integers(-200, 200)
_SLICES = st.tuples(*[st.one_of(st.just(""), _INDEX.map(str))] * 2).map(":".join)
_KEYS = {
    "name": _some(st.one_of(_GLOBS, _EXPRESSIONS.map("re:".__add__))),
    "class": _some(TEXT),
    "layers": _some(st.one_of(_INDEX, _SLICES)),
    "structure": _some(st.sampled_from(list(Structure))),
    "min_parameters": st.integers(0, 1 << 70),
}
SELECTS = st.fixed_dictionaries({}, optional=_KEYS).filter(bool).map(Select.model_validate)


def _specs(
    types: dict[str, st.SearchStrategy[int]], *shapes: dict[str, st.SearchStrategy[Any]]
) -> st.SearchStrategy[dict[str, Any]]:
    """Numbers of each type with their bits, in each shape; only integers may be asymmetric."""
    kinds = [
        st.fixed_dictionaries(
            {"type": st.just(name), "bits": bits, "symmetric": st.sampled_from([True, name != "int"])}
        )
        for name, bits in types.items()
    ]
    return st.builds(dict.__or__, st.one_of(kinds), st.one_of([st.fixed_dictionaries(shape) for shape in shapes]))


_SIZE = st.integers(1, 4096)
_WEIGHTS = _specs(
    {"int": st.integers(2, 8), "float": st.just(8)},
    {"strategy": st.sampled_from(["tensor", "channel"])},
    {"group_size": _SIZE},
    {"block_structure": st.tuples(_SIZE, _SIZE)},
)
_INPUTS = _specs(
    {"int": st.integers(2, 8), "float": st.just(8)},
    {"dynamic": st.just(True)},
    {"strategy": st.just("tensor"), "dynamic": st.booleans()},
    {"group_size": _SIZE, "dynamic": st.just(True)},
)


@st.composite
def _spelled_out(draw: st.DrawFn) -> Scheme:
    """Any weights with any activations, presets' among them, where the two go together."""
    presets = list(PRESETS.values())
    weights = draw(st.one_of(_WEIGHTS, st.sampled_from([scheme.weights for scheme in presets])))
    inputs = draw(st.one_of(st.none(), _INPUTS, st.sampled_from([scheme.input_activations for scheme in presets])))
    try:
        return Scheme.model_validate({"weights": weights, "input_activations": inputs})
    except ValidationError:
        reject()


SCHEMES = st.one_of(st.sampled_from(list(PRESETS.values())), _spelled_out())

_OWN: dict[Any, st.SearchStrategy[Any]] = {
    Select: SELECTS,
    Scheme: SCHEMES,
    str: TEXT,
    Path: TEXT,  # what is read from a file is text
    float: st.floats(allow_nan=False),  # not a number is not equal to itself
}


def of_type(kind: Any) -> st.SearchStrategy[Any]:
    """Values of the type of an option."""
    if kind == TargetName:
        return st.sampled_from(target_names())
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [bound for item in parts[1:] for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]
        bounds = [bound for bound in bounds if isinstance(bound, BaseMetadata)]
        return st.from_type(Annotated[(parts[0], *bounds)]) if bounds else of_type(parts[0])
    if origin in (Union, UnionType):
        return st.one_of([of_type(part) for part in parts])
    if origin is tuple:
        return st.lists(of_type(parts[0]), max_size=3).map(tuple)
    if tables_in(kind) == [kind] and kind not in _OWN:
        return st.builds(kind, **{option.name: of_type(option.type) for option in options_of(kind)})
    return _OWN[kind] if kind in _OWN else st.from_type(kind)


PASSES: st.SearchStrategy[Pass] = st.one_of([of_type(cls) for cls in pass_classes().values()])
PIPELINES: st.SearchStrategy[Pipeline] = st.recursive(
    st.builds(Pipeline, TEXT, st.lists(PASSES, max_size=3).map(tuple), TEXT),
    lambda inner: st.builds(Pipeline, TEXT, st.lists(st.one_of(PASSES, inner), max_size=3).map(tuple), TEXT),
    max_leaves=4,
)
