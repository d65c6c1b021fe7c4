"""Documents made up for tests: a decoder of any size, with the graph of each block."""

from __future__ import annotations

from typing import Any

from qcompiler.inspection.document import Document

_INT4 = {"weights": {"type": "int", "bits": 4, "symmetric": True, "strategy": "group", "group_size": 128}}
_INT8 = {"weights": {"type": "int", "bits": 8, "symmetric": True, "strategy": "group", "group_size": 128}}


def decoder(layers: int, *, experts: int = 0, name: str = "made-up", root: str = "model.layers") -> Document:
    """A compiled Llama-like model: int4, its MLP outputs int8, its head dense. An expert is three linears."""
    nodes: list[dict[str, Any]] = [
        {"name": "input_ids", "op": "input", "kind": "input"},
        _node(
            "embed_tokens", "embedding", ["input_ids"], kind="embedding", path="model.embed_tokens", partition="inputs"
        ),
        {"name": "mask", "op": "aten.triu", "kind": "operation", "partition": "inputs", "inputs": ["input_ids"]},
    ]
    groups: list[dict[str, Any]] = []
    last = "embed_tokens"
    for layer in range(layers):
        made, last, grouped = _block(layer, last, experts, root)
        nodes += made
        groups += grouped
    nodes.append(_linear("lm_head", [last], path="lm_head", partition="head", structure="lm-head", scheme=None))
    nodes.append({"name": "output", "op": "output", "kind": "output", "inputs": ["lm_head"]})
    weights = sum(node.get("bytes", 0) for node in nodes)
    return Document.model_validate(
        {
            "source": "checkpoint",
            "model": {
                "name": name,
                "class_name": "LlamaForCausalLM",
                "dtype": "bfloat16",
                "layers": layers,
                "parameters": 1000,
                "config": {"hidden_size": 256},
            },
            "stage": "lowered",
            "pipeline": {
                "name": "mixed",
                "text": "name: mixed\npasses: [assign, lower]\n",
                "passes": [
                    {"name": "assign", "stage": "annotated", "seconds": 0.25},
                    {"name": "lower", "stage": "lowered", "seconds": 0.75},
                ],
                "after": "lower",
            },
            "target": "vllm-sm90",
            "nodes": nodes,
            "groups": groups,
            "ledger": [
                {"what": "quantized weights", "bytes": weights},
                {"what": "headers", "bytes": 512, "where": "files"},
            ],
            "total_bytes": weights,
            "dense_bytes": 4 * weights,
            "file_bytes": weights + 512,
            "notes": [{"kind": "warning", "text": f"{name} has a note"}],
        }
    )


def _block(layer: int, before: str, experts: int, root: str) -> tuple[list[dict[str, Any]], str, list[dict[str, Any]]]:
    where: dict[str, Any] = {"partition": f"layer {layer}", "layer": layer}
    at, path = f"l{layer}", f"{root}.{layer}"
    norm, after = f"{at}.input_norm", f"{at}.post_norm"
    attention = [f"{at}.self_attn.{name}_proj" for name in "qkv"]
    inside = {"structure": "attention-input", "input_group": f"{at}.qkv-in", "fusion_group": f"{at}.qkv"}
    nodes = [_node(norm, "norm", [before], kind="norm", path=f"{path}.input_norm", **where)]
    for name in attention:
        nodes.append(_linear(name, [norm], path=name.replace(at, path, 1), **inside, **where))
        nodes.append(_node(f"{name}.view", "aten.view", [name], partition=where["partition"]))
    nodes += [
        _node(f"{at}.sdpa", "sdpa", [*(f"{name}.view" for name in attention), "mask"], partition=where["partition"]),
        _linear(
            f"{at}.self_attn.o_proj",
            [f"{at}.sdpa"],
            path=f"{path}.self_attn.o_proj",
            structure="attention-output",
            **where,
        ),
        _node(f"{at}.add", "aten.add", [before, f"{at}.self_attn.o_proj"], partition=where["partition"]),
        _node(after, "norm", [f"{at}.add"], kind="norm", path=f"{path}.post_norm", **where),
    ]
    groups = [
        {"id": f"{at}.qkv-in", "kind": "input", "members": attention, "producer": norm},
        {"id": f"{at}.qkv", "kind": "fusion", "members": attention},
    ]
    downs = []
    for mlp in [f"mlp.experts.{expert}" for expert in range(experts)] or ["mlp"]:
        gate, up, down = (f"{at}.{mlp}.{name}_proj" for name in ("gate", "up", "down"))
        for name in (gate, up):
            nodes.append(_linear(name, [after], path=name.replace(at, path, 1), structure="mlp-input", **where))
        nodes.append(_node(f"{at}.{mlp}.mul", "aten.mul", [gate, up], partition=where["partition"]))
        nodes.append(
            _linear(
                down, [f"{at}.{mlp}.mul"], path=down.replace(at, path, 1), structure="mlp-output", scheme=_INT8, **where
            )
        )
        groups.append({"id": f"{at}.{mlp}.gate-up", "kind": "fusion", "members": [gate, up]})
        downs.append(down)
    nodes.append(_node(f"{at}.out", "aten.add", [f"{at}.add", *downs], partition=where["partition"]))
    return nodes, f"{at}.out", groups


def _node(name: str, op: str, inputs: list[str], *, kind: str = "operation", **facts: Any) -> dict[str, Any]:
    return {"name": name, "op": op, "kind": kind, "inputs": inputs, **facts}


def _linear(name: str, inputs: list[str], *, scheme: dict[str, Any] | None = _INT4, **facts: Any) -> dict[str, Any]:
    bits = scheme["weights"]["bits"] if scheme else 16
    quantized = {
        "scheme": scheme,
        "scheme_name": f"w:int{bits}/g128",
        "format": "pack-quantized",
        "solver": "rtn",
        "algorithm": "rtn",
        "verdict": {"legal": True, "kernel": "wna16"},
        "measures": {"error": 0.2 / 4**bits * (1 + len(name) % 7 / 10)},
    }
    common = {
        "weight_shape": [256, 256],
        "decided": True,
        "because": ["assign: rule 1"],
        "bytes": 8192 * bits,
        "dense_bytes": 8192 * 16,
        "bits_per_weight": float(bits),
    }
    return {**_node(name, "linear", inputs, kind="linear"), **common, **(quantized if scheme else {}), **facts}
