"""Random Llama checkpoints of any size, written shard by shard."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qcompiler.checkpoints.writer import write_safetensors


def llama_config(
    *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = False
) -> LlamaConfig:
    """A Llama config in bfloat16."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


LLAMA_8B = llama_config(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256)
LLAMA_405B = llama_config(hidden=16384, intermediate=53248, layers=126, heads=128, kv_heads=8, vocabulary=128256)
LLAMA_1B = llama_config(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocabulary=128256, tied=True)


def write_config(config: LlamaConfig, folder: Path) -> Path:
    """A model folder without weights."""
    config.save_pretrained(folder)
    return folder


def write_random(config: LlamaConfig, folder: Path, *, shard_bytes: int = 1 << 30) -> Path:
    """A checkpoint with normal random weights, as a model is initialized; kept if it is there already."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    write_config(config, folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    size = total = 0

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shards[-1])
        weight_map.update(dict.fromkeys(shards[-1], name))
        shards[-1].clear()

    for path, parameter in model.named_parameters():
        value = torch.empty(parameter.shape, dtype=torch.bfloat16)
        if parameter.dim() == 1:
            value.fill_(1)
        else:
            value.normal_(0, 0.02, generator=generator)
        if size and size + value.nbytes > shard_bytes:
            flush()
            shards.append({})
            size = 0
        shards[-1][path] = value
        size, total = size + value.nbytes, total + value.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
