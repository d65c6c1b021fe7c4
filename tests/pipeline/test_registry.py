"""Passes and pipelines of any installed package are found by entry point; what is no pass is refused by name."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoints, entry_points, version

import pytest

from qcompiler.errors import ConfigError
from qcompiler.pipeline import load_pipeline, parse_pipeline, print_pipeline, registry
from qcompiler.pipeline.describe import describe_passes, describe_pipelines
from qcompiler.pipeline.registry import packaged_pipelines, pass_class, pass_classes, pass_names, providers
from tests.pipeline.conftest import Install

GOOD = '''
from dataclasses import dataclass
from typing import ClassVar, Literal
from qcompiler.ir.graph import Stage
from qcompiler.pipeline import GraphPass

@dataclass(frozen=True, kw_only=True)
class Twist(GraphPass):
    """Twist every linear."""

    name: ClassVar[str] = "twist"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    how: Literal["left", "right"] = "left"

    def run(self, graph, context):
        return None
'''


def refusal(name: str = "twist") -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        pass_class(name)
    assert raised.value.hint
    return raised.value


def test_a_package_adds_a_pass(install: Install) -> None:
    assert "twist" not in pass_names()
    install("twister", {"twister.py": GOOD}, passes={"twist": "twister:Twist"})
    assert "twist" in pass_names()
    pipeline = parse_pipeline("name: p\npasses:\n- twist: {how: right}\n")
    assert pipeline.passes == (pass_class("twist")(how="right"),)  # type: ignore[call-arg]
    assert parse_pipeline(print_pipeline(pipeline)) == pipeline
    assert "twist  (annotated)\n  Twist every linear.\n    how: left | right = left\n" in describe_passes()


def test_the_versions_of_what_provides_passes_are_known(install: Install) -> None:
    install("twister", {"twister.py": GOOD}, passes={"twist": "twister:Twist"})
    assert providers([pass_class("twist"), pass_class("lower")]) == {
        "twister": "1.0",
        "qcompiler": version("qcompiler"),
    }
    loose = type("Loose", (pass_class("twist"),), {"__module__": "somewhere.inside"})
    assert providers([loose]) == {"somewhere": "unknown"}, "it has the name of a pass that is installed, and is another"


def test_the_path_is_searched_once_for_each_group(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []

    def search(*, group: str) -> EntryPoints:
        searched.append(group)
        return entry_points(group=group)

    install("nothing", {})  # the path is another now
    monkeypatch.setattr(registry, "entry_points", search)
    for _ in range(2):
        load_pipeline("int4-int8")
        assert pass_names()
        assert providers([pass_class("lower"), pass_class("assign")]).keys() == {"qcompiler"}
    assert sorted(searched) == [registry.PASSES, registry.PIPELINES]


def test_a_new_pass_is_among_the_near_names(install: Install) -> None:
    install("twister", {"twister.py": GOOD}, passes={"twist": "twister:Twist"})
    with pytest.raises(ConfigError, match="unknown pass 'twits'; did you mean 'twist'"):
        pass_class("twits")


def test_one_package_found_twice_is_one_pass(install: Install) -> None:
    install("twister", {"twister.py": GOOD}, passes={"twist": "twister:Twist"})
    install("twister-again", {}, passes={"twist": "twister:Twist"})
    assert pass_class("twist").name == "twist"


def test_two_packages_that_claim_one_name_are_both_named(install: Install) -> None:
    install("twister", {"twister.py": GOOD}, passes={"twist": "twister:Twist"})
    install("rival", {"rival.py": GOOD}, passes={"twist": "rival:Twist"})
    message = refusal().message
    assert message.startswith("two packages provide a pass 'twist': ")
    assert "twister.Twist" in message
    assert "rival.Twist" in message
    assert pass_class("assign").name == "assign"


def but(old: str, new: str) -> str:
    """The good pass with something else in it."""
    assert old in GOOD
    return GOOD.replace(old, new)


_LATE = "from __future__ import annotations\n"  # types are names until someone asks for them

REFUSED = {
    " is not a frozen dataclass": [but("frozen=True, ", ""), but("@dataclass(frozen=True, kw_only=True)\n", "")],
    " is not a subclass of GraphPass or StreamingPass": [but("(GraphPass)", ""), "Twist = 3"],
    " does not implement run": [but("def run", "def walk")],
    ": its `name` is 'turn', and must be the entry point's": [but('= "twist"', '= "turn"')],
    ": its `name` is None": [but('name: ClassVar[str] = "twist"', "")],
    " does not say which stages it `requires`": [
        but("requires: ", "needs: "),
        but("frozenset({Stage.ANNOTATED})", "Stage.ANNOTATED"),
        but("frozenset({Stage.ANNOTATED})", "frozenset()"),
        but("frozenset({Stage.ANNOTATED})", "frozenset({'annotated'})"),
    ],
    ": what it `ensures` is a Stage or None, not 'lowered'": [but("    how:", "    ensures = 'lowered'\n    how:")],
    ": the types of its options cannot be checked: ": [
        _LATE + but('Literal["left", "right"]', "Unknown"),
        but('Literal["left", "right"]', "type(Stage)"),
    ],
    " does not load: NameError: name 'Unknown' is not": [but('Literal["left", "right"]', "Unknown")],
    " does not load: ModuleNotFoundError: No module named 'absent_module'": ["import absent_module"],
    " does not load: AttributeError: ": ["Other = 3"],
    " does not load: SyntaxError: ": ["def ("],
    " does not load: RuntimeError: no driver": ["raise RuntimeError('no driver')"],
}


@pytest.mark.parametrize(
    ("said", "module"), [(said, module) for said, modules in REFUSED.items() for module in modules]
)
def test_what_is_no_pass_is_refused_by_name(said: str, module: str, install: Install) -> None:
    install("twister", {"twister.py": module}, passes={"twist": "twister:Twist"})
    assert refusal().message.startswith(f"pass 'twist' (twister:Twist){said}")


def test_a_subclass_is_a_pass_only_with_a_decorator_of_its_own(install: Install) -> None:
    module = GOOD + "\nclass Twice(Twist):\n    name = 'twice'\n    times: int = 2\n"
    install("twister", {"twister.py": module}, passes={"twice": "twister:Twice"})
    assert "is not a frozen dataclass" in refusal("twice").message


def test_the_word_for_a_nested_pipeline_is_no_name_of_a_pass(install: Install) -> None:
    install("twister", {"twister.py": GOOD.replace('"twist"', '"pipeline"')}, passes={"pipeline": "twister:Twist"})
    assert "it must be a word, and not 'pipeline'" in refusal("pipeline").message


def test_a_broken_package_does_not_stand_in_the_way_of_other_passes(install: Install) -> None:
    install("twister", {"twister.py": "import absent_module"}, passes={"twist": "twister:Twist"})
    assert "twist" in pass_names()
    assert load_pipeline("int4-int8").name == "int4-int8"
    with pytest.raises(ConfigError, match="pass 'twist'"):
        pass_classes()


def test_only_the_pass_that_is_asked_for_is_imported(install: Install) -> None:
    install("twister", {"twister.py": GOOD}, passes={"twist": "twister:Twist"})
    assert "twist" in pass_names()
    assert pass_class("assign").name == "assign"
    assert "twister" not in sys.modules


def test_a_package_adds_pipelines(install: Install) -> None:
    text = "name: turned\ndescription: Turned.\npasses: [legalize]\n"
    install("turners", {"turners/__init__.py": "", "turners/turned.yaml": text}, pipelines={"turners": "turners"})
    assert load_pipeline("turned").name == "turned"
    assert "int4-int8" in packaged_pipelines()
    assert "  turned  " in describe_pipelines()


def test_two_packages_that_claim_one_pipeline_are_both_named(install: Install) -> None:
    files = {"turners/__init__.py": "", "turners/int4-int8.yaml": "passes: []"}
    install("turners", files, pipelines={"turners": "turners"})
    with pytest.raises(ConfigError, match=r"packages .* both provide a pipeline 'int4-int8'") as raised:
        packaged_pipelines()
    assert "turners" in raised.value.message
    assert "passes.pipelines" in raised.value.message


def test_a_package_of_pipelines_that_is_not_there_is_named(install: Install) -> None:
    install("turners", {}, pipelines={"turners": "turners_gone"})
    with pytest.raises(ConfigError, match="the pipelines of package turners_gone cannot be read"):
        packaged_pipelines()
