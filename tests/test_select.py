"""Select: which leaves each key means, alone and with others, and what is said where nothing is meant."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qcompiler.errors import ConfigError
from qcompiler.ir.annotations import Leaf, LeafKind, Role, need
from qcompiler.ir.fx import Node
from qcompiler.select import Select, Selection, find
from tests.capture.models import captured
from tests.pipeline.strategies import SELECTS

QKV = ["q_proj", "k_proj", "v_proj"]
# No path has what these look for last, and there are many ways to find out: the first takes part of a second for each.
SLOW = r"re:(?:[\w.]|[\w.][\w.])*[^\w.]"
ENDLESS = r"re:(?:[\w.]|[\w.][\w.]|[\w.]{3})*[^\w.]"


def leaves(model_type: str) -> list[Node]:
    """What rules look at: every leaf but norms."""
    return [node for node, leaf in captured(model_type).leaves() if leaf.kind is not LeafKind.NORM]


def select(**keys: Any) -> Select:
    """A select as it is written in YAML; `class_` for `class`."""
    return Select.model_validate({key.rstrip("_"): value for key, value in keys.items()})


def search(wanted: Select, model_type: str = "llama") -> Selection:
    return find(wanted, leaves(model_type), layer_count=captured(model_type).layer_count)


def chosen(model_type: str = "llama", **keys: Any) -> list[str]:
    """The paths of what a select means, without what all paths of the model begin with."""
    nodes = search(select(**keys), model_type).nodes
    return [need(node, Leaf).path.removeprefix("model.layers.") for node in nodes]


def explained(model_type: str = "llama", **keys: Any) -> str:
    wanted = select(**keys)
    selection = search(wanted, model_type)
    assert selection.nodes == ()
    return selection.explain(wanted, leaves(model_type))


@pytest.mark.parametrize(
    ("keys", "paths"),
    [
        ({"name": "lm_head"}, ["lm_head"]),
        ({"name": "*.0.mlp.*_proj"}, [f"0.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]),
        ({"name": "*.[01].self_attn.?_proj"}, [f"{n}.self_attn.{leaf}" for n in (0, 1) for leaf in [*QKV, "o_proj"]]),
        ({"name": "*.[!0].mlp.up_proj"}, ["1.mlp.up_proj"]),
        ({"name": ["lm_head", "*.1.mlp.up_proj"]}, ["1.mlp.up_proj", "lm_head"]),
        ({"name": r"re:.*\.1\.self_attn\.[qk]_proj$"}, ["1.self_attn.q_proj", "1.self_attn.k_proj"]),
        ({"name": "re:lm"}, ["lm_head"]),
        ({"name": ["re:lm", r"re:.*\.0\.mlp\.up"]}, ["0.mlp.up_proj", "lm_head"]),
        ({"class": "Embedding"}, ["model.embed_tokens"]),
        ({"layers": 0, "structure": "attention-output"}, ["0.self_attn.o_proj"]),
        ({"structure": "lm-head"}, ["lm_head"]),
        ({"structure": "embedding"}, ["model.embed_tokens"]),
        ({"structure": "mlp-output"}, ["0.mlp.down_proj", "1.mlp.down_proj"]),
        ({"structure": ["lm-head", "attention-output"]}, ["0.self_attn.o_proj", "1.self_attn.o_proj", "lm_head"]),
        ({"min_parameters": 11265}, ["model.embed_tokens", "lm_head"]),
        ({"min_parameters": 20481}, []),
    ],
)  # fmt: skip
def test_one_key_means_what_it_says(keys: dict[str, Any], paths: list[str]) -> None:
    assert chosen(**keys) == paths


def test_names_are_matched_whole_by_globs_and_from_the_start_by_expressions() -> None:
    assert chosen(name="lm") == chosen(name="*.mlp.up") == chosen(name="mlp.up_proj") == []
    assert chosen(name="re:up_proj") == []
    assert chosen(name="re:.*up_proj") == chosen(name="*up_proj") == ["0.mlp.up_proj", "1.mlp.up_proj"]


def test_a_dot_in_a_glob_is_a_dot() -> None:
    assert chosen(name="model?layers?0?mlp?up_proj") == ["0.mlp.up_proj"]
    assert chosen(name="*.0.mlp.up.proj") == []


def test_a_class_is_the_name_of_the_module_s_own() -> None:
    assert chosen(class_="Linear") == chosen(name=["*_proj", "lm_head"])
    assert chosen("gpt2", class_="Conv1D") == [
        f"transformer.h.{layer}.{leaf}"
        for layer in (0, 1)
        for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert chosen("gpt2", class_="Linear") == ["lm_head"]
    assert chosen("gpt2", class_=["Linear", "Embedding"])[-1] == "lm_head"
    assert chosen(class_="linear") == []


LAYERS = list(range(4))


@pytest.mark.parametrize(
    ("layers", "meant"),
    [
        (0, [0]),
        (3, [3]),
        (-1, [3]),
        (-4, [0]),
        ("1:3", [1, 2]),
        ("1:", [1, 2, 3]),
        (":2", [0, 1]),
        (":", LAYERS),
        ("-2:", [2, 3]),
        (":-1", [0, 1, 2]),
        ("-3:-1", [1, 2]),
        ("2:99", [2, 3]),
        ("-99:1", [0]),
        ([0, -1], [0, 3]),
        ([0, "2:"], [0, 2, 3]),
        ([1, 1, "1:2"], [1]),
        (4, []),
        (-5, []),
        ("3:1", []),
        ("2:2", []),
        ([], []),
    ],
)
def test_layers_are_counted_as_python_counts(layers: Any, meant: list[int]) -> None:
    # Of a model of four layers; the nodes of one with two stand for its first two.
    nodes = [node for node in leaves("llama") if need(node, Role).layer is not None]
    found = find(select(layers=layers), nodes, layer_count=4).nodes
    assert {need(node, Role).layer for node in found} == {layer for layer in meant if layer < 2}


def test_what_is_in_no_layer_is_in_none_of_them() -> None:
    paths = chosen(layers=":")
    assert len(paths) == 14
    assert not {"lm_head", "model.embed_tokens"} & set(paths)


KEYS: dict[str, list[Any]] = {
    "name": ["*proj", "*.mlp.*", "re:.*(q|up)_proj"],
    "class": ["Linear", "Embedding", ["Linear", "Embedding"]],
    "layers": [0, "1:", [0, -1]],
    "structure": ["mlp-input", ["lm-head", "attention-input"]],
    "min_parameters": [0, 5000, 20000],
}


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in KEYS.items()}).filter(bool))
def test_keys_together_mean_what_each_of_them_means(keys: dict[str, Any]) -> None:
    alone = [set(search(Select.model_validate({key: value})).nodes) for key, value in keys.items()]
    together = search(Select.model_validate(keys))
    assert set(together.nodes) == set.intersection(*alone)
    assert list(together.nodes) == [node for node in leaves("llama") if node in set(together.nodes)]
    if len(keys) > 1:
        unmet = {node: [n for n, nodes in enumerate(alone) if node not in nodes] for node in leaves("llama")}
        names = list(keys)
        assert list(together.near) == [(node, names[m[0]]) for node, m in unmet.items() if len(m) == 1]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "phi"])
def test_structures_together_mean_each_leaf_once(model_type: str) -> None:
    words = ["attention-input", "attention-output", "mlp-input", "mlp-output", "experts", "router"]
    words += ["lm-head", "embedding"]
    each = [path for word in words for path in chosen(model_type, structure=word)]
    assert sorted(each) == sorted(chosen(model_type, structure=words)) == sorted(chosen(model_type, name="*"))


def test_experts_and_routers_can_be_selected() -> None:
    assert chosen("mixtral", structure="experts") == ["0.mlp.experts", "1.mlp.experts"]
    assert chosen("mixtral", structure="router", layers=-1) == ["1.mlp.gate"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "model.layers.0.mlp.up_prj"}, "did you mean 'model.layers.0.mlp.up_proj' or "),
        ({"name": "zzz"}, "names look like model.embed_tokens"),
        ({"name": ["zzz", "lm_heed"]}, "did you mean 'lm_head'?"),
        ({"class": "Conv1D"}, "the model has classes Embedding, Linear"),
        ({"layers": 7}, "the model has layers 0 to 1"),
        ({"structure": "experts"}, "the model has structures attention-input, attention-output, embedding, lm-head, "),
        ({"min_parameters": 10**9}, "the largest has 20480 parameters"),
    ],
)
def test_a_key_that_nothing_matches_is_told_what_the_model_has(keys: dict[str, Any], said: str) -> None:
    assert said in explained(**keys)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"structure": "mlp-output", "layers": 5},
            "nearest: model.layers.0.mlp.down_proj (but for layers: 0); model.layers.1.mlp.down_proj (but for layers: ",
        ),
        ({"name": "lm_head", "class": "Conv1D"}, "nearest: lm_head (but for class: Linear)"),
        ({"name": "*q_proj", "structure": "mlp-input", "layers": 1}, "1.self_attn.q_proj (but for structure: "),
        ({"name": "lm_head", "min_parameters": 10**6}, "nearest: lm_head (but for min_parameters: 20480)"),
        ({"structure": "lm-head", "layers": 9}, "lm_head (but for layers: None)"),
    ],
)  # fmt: skip
def test_what_misses_by_one_key_is_told_with_what_it_has_instead(keys: dict[str, Any], said: str) -> None:
    assert said in explained(**keys)


def test_at_most_three_near_misses_are_shown() -> None:
    assert explained(structure="attention-input", layers=9).count("but for") == 3


def test_where_nothing_comes_near_each_key_is_told_by_itself() -> None:
    assert explained(layers=9, class_="Conv1D", min_parameters=10**9) == (
        "the model has classes Embedding, Linear; the model has layers 0 to 1; the largest has 20480 parameters"
    )


def test_near_misses_of_no_leaves_are_none() -> None:
    selection = find(select(name="*"), [], layer_count=0)
    assert (selection.nodes, selection.explain(select(name="*"), [])) == ((), "the model has none")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "a select without any key: use {name: '*'} to mean every linear"),
        ({"layers": "1-3"}, "'1-3' is neither a layer's index nor a slice like '2:-1'"),
        ({"layers": "a:b"}, "'a:b' is neither"),
        ({"layers": "1:2:3"}, "'1:2:3' is neither"),
        ({"layers": "3"}, "'3' is neither"),
        ({"layers": [0, 1.0]}, "1.0 is neither"),
        ({"layers": True}, "True is neither"),
        ({"layers": [None]}, "None is neither"),
        ({"structure": "mlp-outputs"}, "unknown structure 'mlp-outputs'; did you mean 'mlp-output' or 'mlp-input'"),
        ({"structure": ["lm-head", 3]}, "unknown structure 3; known: attention-input, "),
        ({"name": "re:*"}, "target 're:*' is not a regular expression"),
        ({"name": ["lm_head", "re:(a"]}, "target 're:(a' is not a regular expression: missing )"),
        ({"min_parameters": -1}, "greater than or equal to 0"),
        ({"min_parameters": "many"}, "valid integer"),
        ({"paths": "lm_head"}, "Extra inputs are not permitted"),
    ],
)
def test_a_select_that_means_nothing_is_refused_as_it_is_read(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        Select.model_validate(keys)


@pytest.mark.parametrize("name", [ENDLESS, ["*.zzz", ENDLESS]])
def test_an_expression_that_backtracks_for_ever_is_refused_by_name(name: str | list[str]) -> None:
    with pytest.raises(ConfigError, match="backtracks exponentially") as raised:
        chosen(name=name)
    assert raised.value.message.startswith(f"target {ENDLESS!r} did not finish on 'model.")
    assert "nested repetition" in str(raised.value.hint)


def test_names_that_are_slow_one_by_one_add_up() -> None:
    with pytest.raises(ConfigError, match="backtracks exponentially"):
        find(select(name=SLOW), leaves("llama") * 100, layer_count=2)  # as many as a large model has


@pytest.mark.parametrize("name", ["re:(a+)+$", "re:(.*)*(.*)*x$", "*a*a*a*a*a*a*a*a*a*a*a*a*b", "*" * 500 + "b"])
def test_a_name_that_only_looks_endless_means_nothing(name: str) -> None:
    assert chosen(name=name) == []


@settings(deadline=None)
@given(st.text(alphabet="ab.*?[]!-\\^$(){}|+", max_size=12), st.text(alphabet="ab.-[]", max_size=8))
def test_globs_are_the_globs_of_fnmatch(glob: str, path: str) -> None:
    select(name=glob)  # no glob is wrong
    node = leaves("llama")[0]
    literal = need(node, Leaf).path
    for tried in (glob, f"*{glob}*", literal.replace("e", glob, 1), literal.replace(".", path, 1)):
        if not tried.startswith("re:"):
            found = find(select(name=tried), [node], layer_count=2).nodes
            assert bool(found) == fnmatchcase(literal, tried)


@settings(deadline=None)
@given(SELECTS)
def test_words_for_a_select_show_every_key_that_is_given(wanted: Select) -> None:
    words = str(wanted)
    given_keys = [key for key, value in wanted if value is not None]
    assert words[0] + words[-1] == "{}"
    assert all(f"{key.rstrip('_')}: " in words for key in given_keys)


def test_words_for_a_select_read_as_in_yaml() -> None:
    keys = {"name": "*", "class": ["Linear", "Conv1D"], "layers": [0, "2:"], "structure": "lm-head"}
    assert str(Select.model_validate(keys)) == "{name: *, class: [Linear, Conv1D], layers: [0, 2:], structure: lm-head}"


def test_one_value_and_a_list_of_it_are_the_same_select() -> None:
    assert select(name="a", layers=1, structure="lm-head") == select(name=["a"], layers=[1], structure=["lm-head"])
    assert hash(select(name="a")) == hash(select(name=["a"]))
