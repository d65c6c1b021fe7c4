"""Pipelines, targets and command lines that are wrong: one message that says where and what to do, and no output."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.command import pipeline_file, write
from tests.cli.conftest import Refuse

SCHEME = "{weights: {type: int, bits: 4, group_size: 16}}"
STRUCTURES = "[attention-input, attention-output, mlp-input, mlp-output]"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            (SCHEME, "W4A61"),
            ["yaml:6: passes[0].assign.rules[0].scheme", "unknown scheme 'W4A61'; did you mean 'W4A16'"],
        ),
        ((SCHEME, "{weights: {bits: 9}}"), ["yaml:6: passes[0].assign.rules[0].scheme.weights", "2 to 8 bits, not 9"]),
        (
            ("- calibrate", "- callibrate"),
            ["yaml:9: passes[3]", "unknown pass 'callibrate'; did you mean 'calibrate'?"],
        ),
        (
            ("- calibrate", "- calibrate: {scale: mse}"),
            ["yaml:9: passes[3].calibrate.scale", "did you mean 'scales' or"],
        ),
        (("- calibrate", "- calibrate: {scales: msee}"), ["yaml:9: passes[3].calibrate.scales", "'mse'"]),
        (("scheme:", "shceme:"), ["yaml:6: passes[0].assign.rules[0].shceme", "did you mean 'scheme'"]),
        ((STRUCTURES, "mlp-out"), ["yaml:5: passes[0].assign.rules[0].select.structure", "did you mean 'mlp-output'"]),
        (("passes:", "pases:"), ["yaml", "`passes`"]),
        (("  - lower\n", ""), ["pipeline test writes nothing", "put `- lower` at its end"]),
        (
            ("  - insert-observers\n", ""),
            ["pass calibrate needs a graph that is observed", "put insert-observers before it"],
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_wrong_word_in_a_pipeline_is_named_with_its_line_and_the_right_one(
    change: tuple[str, str], says: list[str], model: Path, tmp_path: Path, refuse: Refuse
) -> None:
    refuse("compile", model, "-p", pipeline_file(tmp_path, change), says=says)


def test_unknown_names_on_the_command_line_are_answered_with_known_ones(
    model: Path, tmp_path: Path, refuse: Refuse
) -> None:
    refuse("compile", model, "-p", "w4a61", says=["unknown pipeline 'w4a61'; did you mean 'w4a16'", "a YAML file"])
    refuse("compile", model, "-p", tmp_path, says=[f"pipeline '{tmp_path}' is a folder", "a YAML file in it"])
    refuse("compile", model, "-p", tmp_path / "none.yaml", says=["none.yaml", "No such file"])
    refuse(
        "plan",
        model,
        "-p",
        "w8a8-rtn",
        "-t",
        "vllm-sm09",
        says=["unknown target 'vllm-sm09'; did you mean", "vllm-cpu"],
    )
    refuse(
        "compile", model, "-p", "w8a8-rtn", "--dtype", "bf16", says=["unknown dtype 'bf16'; did you mean 'bfloat16'"]
    )
    refuse("compile", model, "-p", "w8a8-rtn", "--sample", "3", says=["--sample", "--samples"], usage=True)
    refuse("compil", model, says=["No such command 'compil'", "'compile'"], usage=True)


@pytest.mark.parametrize("device", ["nonsense", "cuda:999", "mps", "meta"])
def test_a_device_that_cannot_be_used_is_refused_in_two_lines(device: str, model: Path, refuse: Refuse) -> None:
    message = refuse("compile", model, "-p", "w8a8-rtn", "--device", device, says=[repr(device), "hint: cpu, cuda"])
    assert message.count("\n") == 2


@pytest.mark.parametrize(
    ("command", "name", "says"),
    [
        ("compile", "calibrat", ["pipeline w8a8-rtn has no such pass; did you mean 'calibrate'?", "assign"]),
        ("plan", "calibrate", ["a plan ends where the first pass needs weights", "it runs assign, legalize"]),
    ],
)
def test_a_pass_that_does_not_run_cannot_be_printed_after(
    command: str, name: str, says: list[str], model: Path, refuse: Refuse
) -> None:
    refuse(command, model, "-p", "w8a8-rtn", "--print-after", name, says=[f"--print-after {name}", *says])


def test_options_that_contradict_each_other_are_refused(model: Path, refuse: Refuse) -> None:
    refuse(
        "plan", model, "-p", "w8a8-rtn", "--json", "--print-pipeline", says=["--json", "--print-pipeline"], usage=True
    )
    refuse("plan", model, "-p", "w8a8-rtn", "--leaves", says=["--leaves: it needs --print-after"], usage=True)
    says = ["a folder has no revisions", "--revision"]
    refuse("compile", model, "-p", "w8a8-rtn", "--revision", "main", says=says)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:pathlib.Path.touch [{}]",
        "name: x\npasses:\n  - !!python/object/apply:os.system ['touch {}']",
        "name: !!python/name:os.system\npasses: []",
        "name: x\npasses:\n  - assign: !!python/object:passes.assign.Assign {{}}",
    ],
)
def test_yaml_that_wants_to_construct_objects_is_refused_unrun(
    text: str, model: Path, tmp_path: Path, refuse: Refuse
) -> None:
    made = tmp_path / "made"
    file = write(tmp_path / "pipeline.yaml", text.format(made))
    refuse("compile", model, "-p", file, says=["pipeline.yaml:", "python/", "only plain values"])
    assert not made.exists()


def _laughs() -> str:
    """Nine levels of nine aliases: 9^9 values in a few hundred bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join([*lines, "passes: *a8"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (_laughs(), "more than 50000 values"),
        ("passes: &a [*a]", "more than 50000 values"),
        ("passes: " + "[" * 20_000, "nests too deeply"),
        ("passes:\n" + "  - lower\n" * 30_000, "longer than"),
        ("name: x\nname: y\npasses: []", "'name' is given twice"),
        ("", "a pipeline is a mapping"),
        ("\0", "not plain YAML"),
    ],
    ids=["aliases", "alias of itself", "nesting", "length", "key twice", "nothing", "binary"],
)
def test_yaml_that_explodes_or_is_none_is_refused(
    text: str, says: str, model: Path, tmp_path: Path, refuse: Refuse
) -> None:
    refuse("compile", model, "-p", write(tmp_path / "pipeline.yaml", text), says=["pipeline.yaml", says])


def test_a_regex_that_backtracks_for_ever_is_refused(model: Path, tmp_path: Path, refuse: Refuse) -> None:
    expression = r"re:^(.*?,?){11}\d$"
    file = pipeline_file(tmp_path, (f"structure: {STRUCTURES}", f"name: '{expression}'"))
    refuse("compile", model, "-p", file, says=[repr(expression), "did not finish on 'model.layers.0.", "backtracks"])


@pytest.mark.parametrize(
    ("expression", "says"),
    [("a{99999999}", "repeats"), ("((((a{1000}){1000}){1000}){1000})", "repeats"), ("(a", "not a regular expression")],
)
def test_a_regex_that_cannot_be_compiled_is_refused(
    expression: str, says: str, model: Path, tmp_path: Path, refuse: Refuse
) -> None:
    file = pipeline_file(tmp_path, (f"structure: {STRUCTURES}", f"name: 're:{expression}'"))
    refuse("compile", model, "-p", file, says=["yaml:5: passes[0].assign.rules[0].select.name", expression, says])


def test_a_rule_that_matches_nothing_is_answered_with_near_names(model: Path, tmp_path: Path, refuse: Refuse) -> None:
    file = pipeline_file(tmp_path, (f"structure: {STRUCTURES}", "name: '*.dwon_proj'"))
    refuse(
        "compile",
        model,
        "-p",
        file,
        says=["rule 1 {name: *.dwon_proj} matches no linear; did you mean 'down_proj'", "hint"],
    )


def test_a_scheme_that_the_target_cannot_load_is_refused_before_weights_are_read(
    broken: Path, tmp_path: Path, refuse: Refuse
) -> None:
    tensors = load_file(broken / "model.safetensors")
    save_file({name: tensor.fill_(float("nan")) for name, tensor in tensors.items()}, broken / "model.safetensors")
    file = pipeline_file(tmp_path, (STRUCTURES, "mlp-output"), (SCHEME, "NVFP4"))
    message = refuse(
        "compile", broken, "-p", file, "-t", "vllm-cpu", says=["model.layers.0.mlp.down_proj", "vllm-cpu", "[nvfp4]"]
    )
    assert "use W4A16" in message, "the mend"
