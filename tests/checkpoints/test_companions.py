from __future__ import annotations

from pathlib import Path

from qcompiler.checkpoints.companions import copy_companions

KEPT = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "qwen.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "modeling_x.py",
    "layers/attention.py",
    "LICENSE",
    "NOTICE.txt",
]
LEFT = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.Q4.gguf",
    "tf_model.h5",
    "onnx/model.onnx",
    "original/params.json",
    "hf_quant_config.json",
    "quantization_config.json",
    "quantize_config.json",
    "quant_config.json",
    "recipe.yaml",
    "README.md",
    ".gitattributes",
    ".git/hook.py",
]


def test_small_files_come_along_and_weights_do_not(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    for name in KEPT + LEFT:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    copies = copy_companions(source, dest)
    assert sorted(str(path.relative_to(dest)) for path in copies) == sorted(KEPT)
    assert all((dest / name).read_text() == name for name in KEPT)


def test_links_of_a_hub_cache_become_files(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("text")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").symlink_to("../blob")
    (tmp_path / "source" / "gone.json").symlink_to("../nothing")
    (tmp_path / "dest").mkdir()
    assert copy_companions(tmp_path / "source", tmp_path / "dest") == [tmp_path / "dest" / "tokenizer.json"]
    assert not (tmp_path / "dest" / "tokenizer.json").is_symlink()
    assert (tmp_path / "dest" / "tokenizer.json").read_text() == "text"


def test_files_that_the_caller_writes_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "generation_config.json").write_text("x")
    assert copy_companions(tmp_path / "source", tmp_path / "dest", without={"generation_config.json"}) == []
