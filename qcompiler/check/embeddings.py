"""Embeddings: Transformers and vLLM quantize them too where a target takes them, by an expression meant for linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from qcompiler.check.config import Config
from qcompiler.check.findings import ALL, Finding
from qcompiler.check.linears import Linear
from qcompiler.check.loaders import Meaning, short
from qcompiler.check.tensors import Stored
from qcompiler.emit.matchers import (
    group_of_target,
    transformers_ignores,
    transformers_matched_target,
    transformers_order,
    vllm_ignores,
    vllm_matched_target,
    without_attention,
)
from qcompiler.emit.patterns import TargetList
from qcompiler.expressions import Engine

_VLLM_CLASS = "VocabParallelEmbedding"
_NO_NAME = ""
"""What vLLM calls an embedding whose model's class gives it no name."""
_CLASSES = ("Embedding", "Module")


class Embeddings:
    """How loaders resolve embeddings. SGLang leaves them dense whatever the config says."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ignore = {engine: TargetList(config.raw["ignore"], engine) for engine in get_args(Engine)}
        linear_groups = group_of_target(without_attention(config.raw))
        self._vllm = TargetList(linear_groups, "regex"), linear_groups
        every = group_of_target(config.raw)
        self._transformers = transformers_order(every), every

    def meanings(self, embedding: Linear) -> Mapping[str, Meaning]:
        """What each loader takes an embedding for."""
        path = embedding.path.name
        targets, group_of = self._transformers
        ignored = transformers_ignores(path, _CLASSES, self._ignore["re"])
        matched = None if ignored else transformers_matched_target(path, _CLASSES, targets)
        return {
            "vllm": self._in_vllm(embedding.name),
            "transformers": self._meaning(group_of, matched),
            "sglang": None,
        }

    def _in_vllm(self, name: str) -> Meaning:
        targets, group_of = self._vllm
        ignored = vllm_ignores(name, self._ignore["regex"], {})
        return self._meaning(group_of, None if ignored else vllm_matched_target(name, _VLLM_CLASS, targets, {}))

    def _meaning(self, group_of: Mapping[str, str], target: str | None) -> Meaning:
        if target is None:
            return None
        return self._config.groups.get(group_of[target], group_of[target])

    def findings(self, embedding: Linear, stored: Stored) -> Iterator[Finding]:
        """Where a loader takes an embedding for what it is not, or its tensors are not those of its scheme."""
        meanings, quantized = self.meanings(embedding), stored.is_quantized(embedding)
        wrong = [loader for loader in ALL if (meanings[loader] is not None) is not quantized]
        if not quantized and wrong:
            yield self._dense(embedding, meanings, wrong)
        elif quantized:
            if wrong:
                yield Finding.of(
                    "stored-quantized",
                    embedding.name,
                    wrong,
                    "this embedding is stored quantized, and is built dense: it is left at random, or loading raises",
                    "store it dense, or serve it where it is read: SGLang has no quantized embeddings",
                )
            if meanings["transformers"] is not None and not stored.has_weight(embedding):
                yield Finding.of(
                    "unloadable",
                    embedding.name,
                    ("transformers",),
                    "this embedding is packed: Transformers looks for its weight as it builds the model, and raises "
                    "AttributeError",
                    "store it dense: packed, it serves vLLM alone",
                )
            meaning = next((meanings[loader] for loader in ALL if meanings[loader] is not None), None)
            if meaning is not None:
                yield from stored.findings(embedding, meaning)

    def _dense(self, embedding: Linear, meanings: Mapping[str, Meaning], wrong: list[str]) -> Finding:
        scheme = short(next(meanings[loader] for loader in wrong))
        does = "they raise, or leave it at random"
        if "vllm" in wrong and self._in_vllm(_NO_NAME) is None:
            wrong = [loader for loader in wrong if loader != "vllm"] or wrong
            does += "; so does vLLM where a model's class names its embedding (Qwen's do, Llama's does not)"
        return Finding.of(
            "stored-dense",
            embedding.name,
            wrong,
            f"a target takes this embedding as {scheme}, and it is stored dense: {does}",
            f"add {embedding.path.name} to ignore, or write the target so that it takes linears alone",
        )
