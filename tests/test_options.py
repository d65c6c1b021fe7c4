"""Tables of options that are made in Python: what they do not take is named by an error of the compiler."""

from __future__ import annotations

from typing import Any

import pytest

from passes.assign import Rule
from passes.assign_targets import Assignment
from qcompiler import QuantSpec, Scheme
from qcompiler.errors import ConfigError
from qcompiler.options import Options
from qcompiler.scheme import KVCacheSpec
from qcompiler.select import Select
from qcompiler.solvers.options import GptqOptions, RtnOptions
from qcompiler.transforms.options import AwqOptions

_ANY = {"name": "*"}


@pytest.mark.parametrize(
    ("table", "arguments", "said", "takes"),
    [
        (QuantSpec, {"bits": 9}, "QuantSpec={'bits': 9}: integers have 2 to 8 bits, not 9", "QuantSpec takes type"),
        (QuantSpec, {"bits": "x"}, "bits='x': input should be a valid integer", "QuantSpec takes type, bits"),
        (QuantSpec, {"bit": 4}, "bit: QuantSpec has no such argument; did you mean 'bits'?", "QuantSpec takes type"),
        (Scheme, {}, "weights: this argument is missing", "QuantSpec takes type"),
        (Scheme, {"weights": {"bits": 1}}, "weights={'bits': 1}: integers have 2 to 8 bits", "QuantSpec takes type"),
        (KVCacheSpec, {"strategy": "group"}, "strategy='group': input should be 'tensor' or", "KVCacheSpec takes str"),
        (Select, {}, "Select={}: a select without any key", "Select takes name, class_, layers"),
        (
            Select,
            {"structur": "mlp-input"},
            "structur: Select has no such argument; did you mean 'structure",
            "Select ",
        ),
        (Select, {"class_": [3]}, "class_[0]=3: input should be a valid string", "Select takes name, class_, layers"),
        (Select, {"layers": [1.5]}, "layers=[1.5]: 1.5 is neither a layer's index nor a slice", "Select takes name"),
        (
            Rule,
            {"select": _ANY, "scheme": "W4"},
            "scheme='W4': unknown scheme 'W4'; did you mean 'W4A8'",
            "Scheme takes",
        ),
        (
            Rule,
            {"select": {"nam": "*"}, "scheme": None},
            "select.nam: Select has no such argument; did",
            "Select takes",
        ),
        (
            Rule,
            {"select": _ANY, "scheme": None, "solver": {"gptq": {"damp": 1}}},
            "solver.gptq.damp: GptqOptions has no such argument; did you mean 'damping'?",
            "GptqOptions takes damping",
        ),
        (
            Assignment,
            {"groups": [{"targets": [], "scheme": None}]},
            "groups[0].targets=[]: tuple should have at least 1 item",
            "TargetGroup takes targets",
        ),
        (
            GptqOptions,
            {"damping": 9},
            "damping=9: input should be less than or equal to 1",
            "GptqOptions takes damping",
        ),
        (RtnOptions, {"damping": 1}, "damping: RtnOptions has no such argument", "RtnOptions takes no arguments"),
        (AwqOptions, {"grid": 1}, "grid=1: input should be greater than or equal to 2", "AwqOptions takes grid"),
    ],
)
def test_an_argument_that_means_nothing_is_named(
    table: type[Options], arguments: dict[str, Any], said: str, takes: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        table(**arguments)
    assert caught.value.message.startswith(said)
    assert "\n" not in caught.value.message
    assert str(caught.value.hint).startswith(takes)


def test_every_argument_that_means_nothing_has_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        Rule(select={"nam": "*"}, scheme="W4", optinal=True)  # type: ignore[arg-type, call-arg]
    names = [line.partition(":")[0] for line in caught.value.message.splitlines()]
    assert names == ["select.nam", "scheme='W4'", "optinal"]
    assert [part.partition(" ")[0] for part in str(caught.value.hint).split("; ")] == ["Select", "Scheme", "Rule"]
