"""Targets: what they mean, who decides where several mean one linear, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from qcompiler.errors import ConfigError, RuleError
from qcompiler.ir.annotations import get_quant
from qcompiler.ir.graph import Graph
from tests.passes.models import Item, Run, block, run

LAYER = "model.layers.0"
INT4, INT8 = "w:int4/g128", "w:int8/g128"


def assignment(*groups: tuple[Any, Any] | dict[str, Any], ignore: Sequence[str] = ()) -> dict[str, Any]:
    """An assignment of these groups; a pair is (targets, scheme)."""
    written = [g if isinstance(g, dict) else {"targets": _listed(g[0]), "scheme": g[1]} for g in groups]
    return {"groups": written, "ignore": list(ignore)}


def assign(*groups: tuple[Any, Any] | dict[str, Any], ignore: Sequence[str] = (), **options: Any) -> Item:
    """The pass with one assignment."""
    return then(assignment(*groups, ignore=ignore), **options)


def then(*assignments: dict[str, Any], **options: Any) -> Item:
    return {"assign-targets": {"assignments": list(assignments), **options}}


def _listed(targets: Any) -> list[str]:
    return [targets] if isinstance(targets, str) else targets


def chosen(graph: Graph) -> dict[str, str]:
    """What became of each linear that something was decided about, by the end of its name."""
    found = {leaf.path: get_quant(node) for node, leaf in graph.linears()}
    return {
        path.rpartition(".")[2]: quant.scheme.short if quant.scheme else "dense"
        for path, quant in found.items()
        if quant
    }


def warnings(done: Run) -> list[str]:
    assert all(kind == "warning" for kind, _ in done.notes), done.notes
    return [text.removeprefix("assign-targets: ") for _, text in done.notes]


ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("Linear", [*ATTENTION, *MLP, "lm_head"]),
        (f"{LAYER}.mlp.down_proj", ["down_proj"]),
        ("lm_head", ["lm_head"]),
        (r"re:.*self_attn\.", ATTENTION),
        (r"re:model.*\.(up|gate)_proj$", ["gate_proj", "up_proj"]),
        (["re:.*down_proj", "lm_head"], ["down_proj", "lm_head"]),
    ],
    ids=str,
)
def test_a_target_is_a_class_or_a_whole_name_or_an_expression(targets: Any, wanted: list[str]) -> None:
    done = run(block(), assign((targets, "W4A16")))
    assert sorted(chosen(done.graph)) == sorted(wanted)
    assert done.notes == []


def test_what_is_ignored_by_class_name_or_expression_stays_dense() -> None:
    done = run(block(), assign(("Linear", "W4A16"), ignore=["lm_head", r"re:.*self_attn\."]))
    assert chosen(done.graph) == dict.fromkeys(MLP, INT4) | dict.fromkeys([*ATTENTION, "lm_head"], "dense")
    assert done.notes == []
    assert set(chosen(run(block(), assign(("Linear", "W4A16"), ignore=["Linear"])).graph).values()) == {"dense"}


def test_a_group_without_a_scheme_leaves_its_linears_dense() -> None:
    done = run(block(), assign((["lm_head", "re:.*down_proj"], None), ("re:.*mlp.*", "W8A16")))
    assert {name: done for name, done in chosen(done.graph).items() if name in (*MLP, "lm_head")} == {
        "gate_proj": INT8,
        "up_proj": INT8,
        "down_proj": "dense",
        "lm_head": "dense",
    }


def test_each_group_has_its_solver() -> None:
    gptq = {"targets": ["re:.*mlp.*"], "scheme": "W4A16", "solver": {"gptq": {"order": "natural"}}}
    graph = run(block(), assign(gptq, ("Linear", "W8A16"))).graph
    solvers = {leaf.path.rpartition(".")[2]: quant for node, leaf in graph.linears() if (quant := get_quant(node))}
    assert {name: quant.solver for name, quant in solvers.items()} == dict.fromkeys(MLP, "gptq") | dict.fromkeys(
        [*ATTENTION, "lm_head"], "rtn"
    )
    options = solvers["up_proj"].options
    assert options is not None
    assert options.order == "natural"


def test_a_name_comes_before_a_class_in_whatever_order_they_stand() -> None:
    groups = [("Linear", "W4A16"), ("re:.*down_proj", "W8A16")]
    for order in (groups, groups[::-1]):
        done = run(block(), assign(*order))
        assert chosen(done.graph)["down_proj"] == INT8
        assert chosen(done.graph)["up_proj"] == INT4
        assert done.notes == []


def test_of_two_names_the_first_decides_and_a_warning_says_what_compressed_tensors_takes() -> None:
    done = run(block(), assign(("re:.*mlp.*", "W4A16"), ("re:.*down_proj", "W8A16")))
    assert chosen(done.graph)["down_proj"] == INT4
    assert warnings(done) == [
        f"re:.*mlp.* ({INT4}) and re:.*down_proj ({INT8}) mean {LAYER}.mlp.down_proj: the first of them decides; "
        f"compressed-tensors takes re:.*down_proj ({INT8})"  # it sorts: d comes before m
    ]


def test_where_compressed_tensors_agrees_the_warning_says_so() -> None:
    done = run(block(), assign(("re:.*(gate|up)_proj", "W4A16"), ("re:.*mlp.*", "W8A16")))
    assert chosen(done.graph)["down_proj"] == INT8
    (text,) = warnings(done)
    assert f"mean {LAYER}.mlp.gate_proj and 1 more: the first of them decides; compressed-tensors takes it too" in text


def test_a_target_given_twice_belongs_to_the_first_group_and_the_library_takes_the_last() -> None:
    done = run(block(), assign(("Linear", "W4A16"), ("Linear", "W8A16")))
    assert set(chosen(done.graph).values()) == {INT4}
    (text,) = warnings(done)
    assert text.endswith(f"and 7 more: the first of them decides; compressed-tensors takes Linear ({INT8})")


def test_groups_that_say_the_same_do_not_conflict() -> None:
    done = run(block(), assign(("re:.*mlp.*", "W4A16"), ("re:.*down_proj", "W4A16")))
    assert done.notes == []


def test_a_later_assignment_decides_over_an_earlier_one_and_says_so() -> None:
    first = assignment(("Linear", "W8A16"), ignore=["lm_head"])
    done = run(block(), then(first, assignment(("re:.*(mlp|lm_head).*", "W4A16"))))
    assert chosen(done.graph) == dict.fromkeys(ATTENTION, INT8) | dict.fromkeys([*MLP, "lm_head"], INT4)
    # What the first ignores is not among them: nothing was decided of it.
    (text,) = warnings(done)
    assert text == f"re:.*(mlp|lm_head).* decides on {LAYER}.mlp.gate_proj and 2 more, over assign-targets: Linear"


def test_what_a_later_assignment_ignores_keeps_what_an_earlier_one_gave() -> None:
    later = assignment(("Linear", "W4A16"), ignore=["re:.*mlp.*"])
    done = run(block(), then(assignment(("re:.*mlp.*", "W8A16")), later))
    assert chosen(done.graph) == dict.fromkeys(MLP, INT8) | dict.fromkeys([*ATTENTION, "lm_head"], INT4)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("Linaer", "did you mean 'Linear'?"),
        ("lm_haed", "did you mean 'lm_head'?"),
        (r"re:.*\.dwn_proj$", "did you mean 'down_proj'"),
        (f"{LAYER}.mlp.upp_proj", f"did you mean '{LAYER}.mlp.up_proj'"),
        ("re:.*vision_tower.*", f"names look like {LAYER}.self_attn.q_proj"),
        ("Embedding", "(only embedding: model.embed_tokens); "),
    ],
    ids=str,
)
def test_a_target_that_matches_nothing_is_a_warning_with_near_misses(target: str, says: str) -> None:
    done = run(block(), assign((target, "W8A16"), ("Linear", "W4A16")))
    assert set(chosen(done.graph).values()) == {INT4}
    (text,) = [text for kind, text in done.notes if kind == "warning"]
    assert text.startswith(f"assign-targets: target {target} matches no linear")
    assert says in text


def test_an_ignore_that_matches_nothing_is_a_warning_with_near_misses() -> None:
    done = run(block(), assign(("Linear", "W4A16"), ignore=["lm_haed", "re:.*norm", "model.embed_tokens"]))
    assert chosen(done.graph)["lm_head"] == INT4
    assert warnings(done) == ["ignore lm_haed matches nothing; did you mean 'lm_head'?"]


def test_experts_that_a_target_means_are_said_to_stay_dense() -> None:
    done = run("mixtral", assign(("Linear", "FP8_DYNAMIC")))
    assert done.notes == [
        (
            "fallback",
            f"assign-targets: {LAYER}.mlp.experts and 1 more stays dense, though Linear means it: experts is not "
            "quantized",
        )
    ]
    ignored = run("mixtral", assign(("Linear", "FP8_DYNAMIC"), ignore=["re:.*experts.*", "re:.*mlp.gate$"]))
    assert ignored.notes == []
    assert run("mixtral", assign(("re:.*self_attn.*", "FP8_DYNAMIC"))).notes == []


def test_notes_and_differences_are_put_into_the_report() -> None:
    done = run(block(), assign(("Linear", "W4A16"), notes=["this has no effect"], differences=["that is other"]))
    assert done.notes == [("info", "this has no effect"), ("fallback", "that is other")]


def test_fused_linears_must_agree_once_every_assignment_has_spoken() -> None:
    done = run(block(), then(assignment(("re:.*gate_proj", "W4A16")), assignment(("re:.*up_proj", "W4A16"))))
    assert chosen(done.graph) == {"gate_proj": INT4, "up_proj": INT4}
    with pytest.raises(RuleError, match=r"gate_proj: w:int4/g128, by assign-targets: re:\.\*gate_proj\n.*w:int8/g128"):
        run(block(), then(assignment(("re:.*gate_proj", "W4A16")), assignment(("re:.*up_proj", "W8A16"))))


def test_fused_linears_that_an_expression_splits_are_told_how_it_matches() -> None:
    done = run(block(), assign(("Linear", "W4A16"), ignore=["re:.*gate$"]))
    assert chosen(done.graph)["gate_proj"] == INT4
    with pytest.raises(RuleError, match=r"gate_proj: dense, by assign-targets: ignore re:\.\*gate\n") as raised:
        run(block(), assign(("Linear", "W4A16"), ignore=["re:.*gate"]))
    assert raised.value.hint is not None
    assert "re:.*gate means gate_proj too, and re:.*gate$ does not" in raised.value.hint


def test_the_cache_is_quantized_as_asked_and_only_one_way() -> None:
    done = run(block(), assign(kv_cache={"strategy": "attn_head"}))
    assert done.graph.kv_cache is not None
    assert done.graph.kv_cache.strategy == "attn_head"
    with pytest.raises(RuleError, match="kv_cache asks for one scale per tensor, and an earlier pass for one per attn"):
        run(block(), assign(kv_cache={"strategy": "attn_head"}), assign(kv_cache={}))


def test_an_expression_that_is_none_is_refused_where_it_is_written() -> None:
    with pytest.raises(
        ConfigError, match=r"assignments\[0\]\.groups\[0\]\.targets\[0\]: target 're:\(' is not a regular expression"
    ):
        run(block(), assign(("re:(", "W4A16")))
