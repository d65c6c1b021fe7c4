"""Checkpoints from people one need not trust: exit 2 with one message, quickly, and nothing outside the folder read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompiler import expressions
from qcompiler.check import entries
from tests.check.checkpoints import DOWN, Edited
from tests.check.conftest import Base, Check
from tests.cli.conftest import Refuse

SECONDS = 30.0  # of the process: machines do other things too


@pytest.fixture
def refused(refuse: Refuse, tmp_path: Path) -> Callable[..., None]:
    """`refused(folder, says=[...])`: `qcompiler check` ends with 2 and says so, in time."""

    def call(folder: Path, says: list[str]) -> None:
        start = time.process_time()
        refuse("check", folder, says=says)
        assert time.process_time() - start < SECONDS

    return call


@pytest.fixture
def folder(base: Base, tmp_path: Path) -> Path:
    """A sound checkpoint, to be broken."""
    return base("packed").write(tmp_path / "hostile")


Refused = Callable[..., None]
Edit = Callable[[Edited], object]


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "truncated"),
        ((2**62).to_bytes(8, "little") + b"{}", "claims 4611686018427387904 bytes"),
        (header(a=ONE), "truncated"),
        (header(a=ONE) + b"\0" * 8, "bytes that no tensor owns"),
        (header(a=ONE, b={**ONE, "data_offsets": [0, 4]}) + b"\0" * 8, "overlaps"),
        (header(a={**ONE, "shape": [2**40, 2**40]}) + b"\0" * 4, "owns 4 bytes but"),
        (header(a={**ONE, "shape": [-1]}) + b"\0" * 4, "impossible shape"),
        (header(a={**ONE, "dtype": "F33"}) + b"\0" * 4, "unknown dtype"),
        ((6).to_bytes(8, "little") + b"[1, 2]", "not an object"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "cannot be parsed"),
    ],
)
def test_headers_that_lie(data: bytes, says: str, folder: Path, refused: Refused) -> None:
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, ["model.safetensors", says])


@pytest.mark.parametrize(
    "name",
    [
        "a" * 5000 + ".safetensors",
        "a\0.safetensors",
        "../outside.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..\\a.safetensors",
    ],
)
def test_an_index_that_leaves_the_folder(name: str, folder: Path, refused: Refused) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder, ["not the plain name of a safetensors file in the same folder"])


@pytest.mark.parametrize("place", ["targets", "ignore"])
@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("re:" + "|".join(f"a{n}b" for n in range(200_000)), "regular expressions; at most"),
        (r"re:([\w.]|[\w.][\w.])*[^\w.]$", "did not finish"),
        ("re:((a{1,1000}){1,1000}){1,1000}", "repeats parts of itself"),
        ("re:" + "[:" * 60_000, "has 120003 characters"),
    ],
)
def test_expressions_that_do_not_end(
    place: str, expression: str, says: str, base: Base, tmp_path: Path, refused: Refused
) -> None:
    edited = base("packed")
    entries = edited.group()["targets"] if place == "targets" else edited.quantization["ignore"]
    entries.append(expression)
    refused(edited.write(tmp_path / "hostile"), [says])


def test_expressions_that_are_slow_to_compile_together(
    base: Base, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "_COMPILE_SECONDS", 0.5)
    edited = base("packed")
    edited.quantization["ignore"] += [f"re:(?i){n}" + "[\x00-\uffff]" * 20 for n in range(100)]
    refused(edited.write(tmp_path / "hostile"), ["take longer than 0.5 s to compile"])


def test_expressions_that_are_slow_together(
    base: Base, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "_BUDGET", 0.5)
    edited = base("packed")
    edited.group()["targets"] += [rf"re:.{{6}}([\w.]|[\w.][\w.])*[^\w.]{{{n}}}$" for n in range(1, 100)]
    refused(edited.write(tmp_path / "hostile"), ["expressions on", "names take longer than 0.5 s"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{" * 100_000, "is not JSON"),
        ("[1]", "holds a list"),
        ("\ud800", None),
        ("{}", "no quantization_config"),
        ('{"quantization_config": []}', "no quantization_config"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "gptq"),
        ('{"quantization_config": {}}', "config_groups"),
        ('{"quantization_config": {"config_groups": [1]}}', "config_groups"),
        ('{"quantization_config": {"config_groups": {"a": {"targets": [1]}}}}', "config_groups"),
        ('{"quantization_config": {"config_groups": {"a": {"targets": "Linear"}}}}', "config_groups"),
        ('{"quantization_config": {"config_groups": {"a": null}}}', "config_groups"),
        ('{"quantization_config": {"config_groups": {}, "ignore": {"a": 1}}}', "ignore"),
        ('{"quantization_config": {"config_groups": {}, "sparsity_config": {"format": "x"}}}', "sparse"),
    ],
)
def test_configs_that_are_none(text: str, says: str | None, folder: Path, refused: Refused) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(folder, ["config.json", says or "is not JSON"])


def test_expressions_that_no_parser_ends_are_a_finding(base: Base, tmp_path: Path, run: Callable[..., Any]) -> None:
    edited = base("packed")
    edited.quantization["ignore"].append("re:" + "(" * 4_900 + ")" * 4_900)
    ran = run("check", edited.write(tmp_path / "hostile"))
    assert (ran.code, ran.err) == (1, "")
    assert "error: target-invalid" in ran.out


def test_more_expressions_than_anyone_writes(base: Base, tmp_path: Path, refused: Refused) -> None:
    edited = base("packed")
    edited.quantization["ignore"] += [rf"re:.*a{n}(b|c)*d$" for n in range(50_000)]
    refused(edited.write(tmp_path / "hostile"), ["50007 regular expressions"])


def test_more_groups_than_anyone_writes(base: Base, tmp_path: Path, refused: Refused) -> None:
    edited = base("packed")
    edited.groups.update({f"W{n}": ["x"] for n in range(50_000)})
    refused(edited.write(tmp_path / "hostile"), ["50001 config_groups"])


@pytest.mark.parametrize("value", ["[]", "{}", '"ab"'])
@pytest.mark.parametrize("place", ["config.json", "model.safetensors"])
def test_more_values_than_there_is_memory_for(value: str, place: str, folder: Path, refused: Refused) -> None:
    text = b'{"a":[' + f"{value},".encode() * 5_100_000 + b"0]}"
    (folder / place).write_bytes(text if place == "config.json" else len(text).to_bytes(8, "little") + text)
    refused(folder, [place, "holds more than 5000000 values"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("target", ["/dev/zero", "/proc/self/status", None])
def test_what_is_no_file_is_not_read(name: str, target: str | None, folder: Path, refused: Refused) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    if target is None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    else:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
    refused(folder, ["hostile"])


def test_errors_move_no_cursor(folder: Path, run: Callable[..., Any]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "\x1b[2J.safetensors"}}))
    ran = run("check", folder)
    assert ran.code == 2
    assert r"\x1b[2J.safetensors: the shard is missing" in ran.err
    assert all(line.isprintable() for line in ran.err.splitlines())


def test_a_giant_config_is_not_read(folder: Path, refused: Refused) -> None:
    with (folder / "config.json").open("ab") as file:
        file.truncate(10 << 30)
    refused(folder, ["a config of 10737418240 bytes"])


def test_a_giant_index_is_not_read(folder: Path, refused: Refused) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "model.safetensors.index.json").open("wb") as file:
        file.truncate(10 << 30)
    refused(folder, ["an index of 10737418240 bytes"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 4000), ("num_local_experts", 10**9), ("head_dim", 10**9), ("hidden_size", 10**30)],
)
def test_more_than_there_can_be_is_not_built(
    key: str, value: int, base: Base, tmp_path: Path, refused: Refused
) -> None:
    edited = base("mixture" if "experts" in key else "packed")
    edited.config[key] = value
    refused(edited.write(tmp_path / "hostile"), [key, f"is {value}, and the files hold"])


def test_more_modules_than_any_model_has_are_not_judged(folder: Path, refused: Refused) -> None:
    none = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    (folder / "model.safetensors").write_bytes(header(**{f"m.{i}.weight": none for i in range(100_001)}))
    refused(folder, ["tensors of 100001 modules", "at most 100000"])


NONSENSE = (None, 7, "x", [], {"num_bits": {}}, {"num_bits": 4, "group_size": "a"}, {"type": [], "scale_dtype": 3})
MAY_BE_NULL = ("input_activations", "format")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (part, value)
        for part in ("weights", "input_activations", "format", "targets")
        for value in NONSENSE
        if not (part in MAY_BE_NULL and value is None) and not (part == "targets" and value == [])
    ],
)
def test_nonsense_in_a_group_is_a_finding_or_a_refusal(
    part: str, value: Any, base: Base, tmp_path: Path, run: Callable[..., Any]
) -> None:
    edited = base("packed")
    edited.group()[part] = value
    ran = run("check", edited.write(tmp_path / "hostile"))
    assert ran.code in (1, 2), ran
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("value", [7, "x", [1], {"num_bits": {}}, {"group_size": "a"}, {"scale_dtype": 3}])
def test_nonsense_about_the_cache_is_a_finding(value: Any, base: Base, tmp_path: Path, run: Callable[..., Any]) -> None:
    edited = base("packed")
    edited.quantization["kv_cache_scheme"] = value
    ran = run("check", edited.write(tmp_path / "hostile"))
    assert ran.code == 1, ran
    assert "cache-invalid" in ran.out


@pytest.mark.parametrize("shape", [[2**31, 2**31], [-5, 3], [0, 0]])
def test_a_weight_shape_that_lies(shape: list[int], base: Base, tmp_path: Path, run: Callable[..., Any]) -> None:
    edited = base("packed")
    edited.config["model_type"] = "unheard-of"  # sizes come from the tensors
    edited.tensors["model.layers.0.mlp.down_proj.weight_shape"] = torch.tensor(shape)
    assert run("check", edited.write(tmp_path / "hostile")).code in (0, 1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bool, torch.uint8, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_that_are_no_integers_are_a_finding(
    dtype: torch.dtype, symmetric: bool, base: Base, checked: Check
) -> None:
    edited = base("mixed")
    for part in ("weights", "input_activations"):
        edited.group("group_1")[part]["symmetric"] = symmetric
    for part in ("weight_zero_point", "input_zero_point"):
        edited.tensors[f"{DOWN}.{part}"] = torch.ones(1).to(dtype)
    assert not checked(edited).ok


def test_code_that_comes_along_is_not_run(base: Base, tmp_path: Path, run: Callable[..., Any]) -> None:
    edited = base("packed")
    edited.config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    folder = edited.write(tmp_path / "hostile")
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    ran = run("check", folder)
    assert ran.code == 0
    assert "which is not run unasked" in ran.out
    assert not (tmp_path / "ran").exists()


def test_more_scales_than_weights_are_not_read(base: Base, tmp_path: Path, run: Callable[..., Any]) -> None:
    edited = base("mixed")
    giant = {"dtype": "BF16", "shape": [1 << 33], "data_offsets": [0, 1 << 34]}
    name = "model-00002-of-00002.safetensors"
    keys = ["model.layers.0.mlp.down_proj.weight_scale", "model.layers.0.mlp.down_proj.input_scale"]
    for key in keys:
        del edited.tensors[key]
    edited.index = dict.fromkeys(edited.tensors, "a.safetensors") | dict.fromkeys(keys, name)
    edited.files = {"a.safetensors": edited.tensors}
    folder = edited.write(tmp_path / "hostile")
    (folder / "model.safetensors").unlink()
    text = header(**{keys[0]: giant, keys[1]: {**giant, "data_offsets": [1 << 34, 1 << 35]}})
    with (folder / name).open("wb") as file:
        file.write(text)
        file.truncate(len(text) + (1 << 35))  # sparse: 32 GiB of zeros
    start = time.process_time()
    ran = run("check", folder)
    assert time.process_time() - start < SECONDS
    assert ran.code == 1, ran
    assert "tensor-shape" in ran.out
