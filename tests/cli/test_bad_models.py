"""Models that are not there, not known, not trusted or not of a kind that is compiled."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.command import write
from tests.cli.conftest import Refuse, Run


def config_only(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write(folder / "config.json", json.dumps(config))
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    return config_only(folder, **{**config, **changes})


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("t5", ["t5 is an encoder-decoder", "decoder-only"]),
        ("llava", ["llava is multimodal", "vision_config", "save its language model alone"]),
        ("mamba", ["mamba has state-space", "attention"]),
        ("jamba", ["jamba has state-space", "attention"]),
        ("bert", ["BertLMHeadModel attends to later tokens", "is_decoder"]),
        ("vit", ["vit has no causal language model", "AutoModelForCausalLM"]),
        ("lama", ["config.json: model_type 'lama' is not known", "did you mean 'llama'"]),
        (None, ["config.json: model_type None is not known"]),
    ],
)
def test_a_model_of_another_kind_is_refused_with_its_reason(
    model_type: str | None, says: list[str], tmp_path: Path, refuse: Refuse
) -> None:
    folder = config_only(tmp_path / "model", model_type=model_type)
    refuse("compile", folder, "-p", "w8a8-rtn", says=[*says, "hint: "])


def test_a_model_that_is_already_quantized_is_refused(broken: Path, compiled: Path, refuse: Refuse) -> None:
    edit_config(broken, quantization_config={"quant_method": "gptq", "bits": 4})
    refuse("compile", broken, "-p", "w8a8-rtn", says=["already quantized", "original"])
    refuse("compile", compiled, "-p", "w8a8-rtn", says=["already quantized", "original"])
    refuse("verify", compiled, "--reference", broken, says=[f"error: {broken}: llama: this model is already quantized"])


@pytest.mark.parametrize("command", ["compile", "plan"])
def test_a_model_whose_weights_alone_are_quantized_is_refused(command: str, broken: Path, refuse: Refuse) -> None:
    tensors = load_file(broken / "model.safetensors")
    codes = {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items() if "_proj." in key}
    scales = {f"{key}_scale_inv": torch.ones(1, 1) for key in codes}
    save_file(tensors | codes | scales, broken / "model.safetensors")
    refuse(command, broken, "-p", "w8a8-rtn", says=["_proj.weight' is stored as float8_e4m3fn", "already quantized"])


def test_quantized_weights_are_not_where_an_undeclared_dtype_is_read_off(broken: Path, refuse: Refuse) -> None:
    tensors = load_file(broken / "model.safetensors")
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}, broken / "model.safetensors")
    edit_config(broken, dtype=None)
    refuse("plan", broken, "-p", "w8a8-rtn", says=["is stored as float8_e4m3fn", "already quantized"])


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantization_config.json", "quant_config.json"])
def test_another_tools_description_of_a_quantization_is_refused(name: str, broken: Path, refuse: Refuse) -> None:
    write(broken / name, "{}")
    refuse("plan", broken, "-p", "w8a8-rtn", says=[f"{broken / name}: ", "already quantized", "dense"])


@pytest.mark.parametrize("command", ["compile", "plan"])
def test_tensors_that_the_model_has_no_place_for_are_told(command: str, broken: Path, run: Run, results: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    second = {key.replace(".0.", ".1."): value.clone() for key, value in tensors.items() if ".layers.0." in key}
    save_file(tensors | second, broken / "model.safetensors")
    ran = run(command, broken, "-p", "w8a8-rtn", *(("-o", results / "out") if command == "compile" else ()))
    assert ran.code == 0
    told = " ".join(ran.out.split()).partition("warning: left out, ")[2]
    assert f"({len(second)}): {', '.join(sorted(second)[:3])}, ..." in told


def test_a_model_without_a_name_is_not_the_current_folder(
    model: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    for name in ("", " "):
        refuse("plan", name, "-p", "w8a8-rtn", says=["the model's name is empty", "folder or a hub id"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads (3)"),
        ({"hidden_act": "sliu"}, "'sliu'"),
        ({"num_hidden_layers": 0}, "0 layers"),
        ({"num_hidden_layers": -2}, "-2 layers"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(
    changes: dict[str, Any], says: str, broken: Path, refuse: Refuse
) -> None:
    refuse("plan", edit_config(broken, **changes), "-p", "w8a8-rtn", says=["llama", says, "config.json"])


@pytest.mark.parametrize("text", ["{", "[]", "\0", '{"model_type": "llama"' + "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(text: str, broken: Path, refuse: Refuse) -> None:
    write(broken / "config.json", text)
    refuse("compile", broken, "-p", "w8a8-rtn", says=[str(broken / "config.json"), "JSON", "download"])


def test_a_model_that_is_not_there_is_refused(
    model: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refuse(
        "compile", tmp_path / "none", "-p", "w8a8-rtn", says=[f"{tmp_path / 'none'}: there is no such folder", "hub id"]
    )
    refuse("compile", model / "config.json", "-p", "w8a8-rtn", says=["config.json: this is a file", "give the folder"])
    refuse("compile", tmp_path, "-p", "w8a8-rtn", says=[f"{tmp_path} holds no config.json", "save_pretrained"])
    refuse(
        "compile",
        "owner/nobody-has-this",
        "-p",
        "w8a8-rtn",
        says=["owner/nobody-has-this: ", "no such folder", "online"],
    )


CONFIGURATION = """\
from transformers import LlamaConfig

class PebbleConfig(LlamaConfig):
    model_type = "pebble"
"""
MODELING = """\
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_pebble import PebbleConfig

Path({ran!r}).touch()

class PebbleForCausalLM(LlamaForCausalLM):
    config_class = PebbleConfig
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that the code of `remote` makes."""
    return tmp_path / "ran"


@pytest.fixture
def remote(broken: Path, ran: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A model that brings its own code, which Transformers copies to a folder of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    classes = {
        "AutoConfig": "configuration_pebble.PebbleConfig",
        "AutoModelForCausalLM": "modeling_pebble.PebbleForCausalLM",
    }
    edit_config(broken, model_type="pebble", architectures=["PebbleForCausalLM"], auto_map=classes)
    write(broken / "configuration_pebble.py", CONFIGURATION)
    write(broken / "modeling_pebble.py", MODELING.format(ran=str(ran)))
    yield broken
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_remote_code_is_not_run_unasked(remote: Path, ran: Path, refuse: Refuse) -> None:
    refuse("compile", remote, "-p", "w8a8-rtn", says=[str(remote), "its own modeling code", "--trust-remote-code"])
    refuse("plan", remote, "-p", "w8a8-rtn", says=[str(remote), "its own modeling code", "--trust-remote-code"])
    assert not ran.exists()


def test_trusted_remote_code_compiles_and_goes_into_the_output(
    remote: Path, ran: Path, run: Run, refuse: Refuse, results: Path
) -> None:
    out = results / "out"
    assert run("compile", remote, "-p", "w8a8-rtn", "-o", out, "--trust-remote-code").code == 0
    assert {"configuration_pebble.py", "modeling_pebble.py"} <= {file.name for file in out.iterdir()}
    ran.unlink()
    refuse("verify", out, says=[str(out), "its own modeling code", "--trust-remote-code"])
    assert not ran.exists()
    verified = run("verify", out, "--trust-remote-code")
    assert verified.code == 0
    assert "nothing missing" in verified.out
    shutil.rmtree(out)


@pytest.mark.parametrize("broken_how", ["raises", "is missing"])
def test_trusted_remote_code_that_does_not_run_is_named(broken_how: str, remote: Path, refuse: Refuse) -> None:
    code = remote / "modeling_pebble.py"
    code.unlink() if broken_how == "is missing" else write(code, "raise RuntimeError('pebbles everywhere')")
    says = [
        "pebble",
        "modeling_pebble.py" if broken_how == "is missing" else "pebbles everywhere",
        "that the model brings",
    ]
    refuse("compile", remote, "-p", "w8a8-rtn", "--trust-remote-code", says=says)
