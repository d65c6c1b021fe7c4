"""What is larger than any model is refused by name, before it is built, traced or computed."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from transformers import LlamaConfig

from qcompiler import limits
from qcompiler.capture import capture_graph, export
from qcompiler.capture.buffers import non_persistent_buffers
from qcompiler.capture.twin import with_random_weights
from qcompiler.errors import CaptureError, SizeError
from qcompiler.meta import build_on_meta
from qcompiler.source import open_model
from tests.capture.models import on_meta
from tests.zoo import tiny_config


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"model_type": "gpt2", "n_layer": 10**9}, "n_layer"),
        ({"model_type": "opt", "num_hidden_layers": limits.MOST_LAYERS + 1}, "num_hidden_layers"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
    ],
)
def test_more_layers_than_any_model_has_are_not_built(config: dict[str, Any], key: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SizeError, match=rf"config\.json: {key} is \d+; at most {limits.MOST_LAYERS} layers"):
        open_model(tmp_path)


def test_a_giant_config_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(SizeError, match="a config of 10737418240 bytes"):
        open_model(tmp_path)


def test_modules_without_end_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_MODULES", 100)
    before = dict(torch_modules._global_module_registration_hooks)
    config = LlamaConfig(**{**tiny_config("llama").to_dict(), "num_hidden_layers": 20})
    with pytest.raises(SizeError, match="llama: the model has more than 100 modules"):
        build_on_meta(config, dtype=torch.float32)
    assert torch_modules._global_module_registration_hooks == before


def test_modules_that_another_thread_makes_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_MODULES", 3)
    made: list[nn.Module] = []
    with limits.modules_bounded("one"):
        other = Thread(target=lambda: made.append(nn.Sequential(*(nn.Identity() for _ in range(9)))))
        other.start()
        other.join()
        nn.Sequential(*(nn.Identity() for _ in range(3)))
    assert len(made) == 1


def test_layers_that_are_not_alike_are_traced_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta("gpt2", n_layer=3, scale_attn_by_inverse_layer_idx=True)
    monkeypatch.setattr(limits, "MOST_TRACED", 2)
    with pytest.raises(SizeError, match=r"3 decoder layers would have to be traced one by one.*; at most 2 are"):
        capture_graph(model)
    assert capture_graph(on_meta("gpt2", n_layer=3)).layer_count == 3  # these are


def test_a_deep_model_that_does_not_trace_is_not_traced_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_meta("aria_text", num_hidden_layers=3)
    ways: list[bool] = []
    plain = export._export

    def counted(model: Any, *, repeat: bool) -> Any:
        ways.append(repeat)
        return plain(model, repeat=repeat)

    monkeypatch.setattr(export, "_export", counted)
    monkeypatch.setattr(export, "MOST_TRACED", 2)
    with pytest.raises(CaptureError, match="cannot be captured"):
        capture_graph(model)
    assert ways == [True]


def test_buffers_larger_than_memory_are_not_computed() -> None:
    config = LlamaConfig(**{**tiny_config("llama").to_dict(), "head_dim": 2**40})
    with pytest.raises(SizeError, match=r"LlamaForCausalLM has in no checkpoint would take \d{13} bytes"):
        non_persistent_buffers(build_on_meta(config, dtype=torch.float32))


def test_a_twin_larger_than_memory_is_not_made() -> None:
    config = LlamaConfig(**{**tiny_config("llama").to_dict(), "vocab_size": 10**12})
    with pytest.raises(SizeError, match=r"a tiny LlamaForCausalLM would take \d{15} bytes"):
        with_random_weights(config)
