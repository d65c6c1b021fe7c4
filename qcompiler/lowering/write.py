"""Write the checkpoint: a shard per partition while the sweep goes on, config and provenance at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qcompiler.checkpoints.writer import CheckpointWriter, DiskTensor
from qcompiler.emit.config import LOADERS, build_quantization_config
from qcompiler.errors import VerificationError
from qcompiler.formats import cache_scale, pack
from qcompiler.ir.annotations import Leaf, get, scheme_of
from qcompiler.ir.graph import Graph
from qcompiler.ir.partition import partitions
from qcompiler.lowering.predict import disk_prefix, quantized_paths, written_paths
from qcompiler.lowering.sites import disk_sites, sites
from qcompiler.lowering.ties import untied
from qcompiler.pipeline.base import Context, Destination, PartitionWork
from qcompiler.runtime.parallel import in_parallel
from qcompiler.runtime.weights import tensor_paths
from qcompiler.tensors import tensor_bytes


class CheckpointStep:
    """The writing side of a sweep: partitions in order, and every tensor in the shard of its first use."""

    def __init__(self, graph: Graph, context: Context, destination: Destination) -> None:
        self._graph = graph
        self._context = context
        self._quantized = quantized_paths(graph)
        self._config = build_quantization_config(
            sites(graph),
            also=disk_sites(graph, context.source),
            kv_cache=graph.kv_cache,
            loaders=graph.loaders or LOADERS,
        )
        self._dense = self._assign_paths()
        shards = [name for name, (dense, packed) in self._dense.items() if dense or packed]
        self._shard = {name: index for index, name in enumerate(shards)}
        self._written = 0
        self._writer = CheckpointWriter.open(
            destination.folder,
            source=context.source.folder,
            fingerprint=context.provenance,
            shards=len(shards),
            predicted_bytes=context.report.total_bytes,
            overwrite=destination.overwrite,
        )
        self._writer.__enter__()

    def _assign_paths(self) -> dict[str, tuple[list[str], list[str]]]:
        """Per partition: parameters to write dense, and linears to write packed. What no node uses comes last."""
        left = dict.fromkeys(written_paths(self._graph, self._context.source))
        packed_left = {get_leaf.path for node in self._quantized.values() if (get_leaf := get(node, Leaf)) is not None}
        plan: dict[str, tuple[list[str], list[str]]] = {}
        parts = partitions(self._graph)
        for part in parts:
            dense = [path for path in tensor_paths(self._graph, part) if path in left]
            packed = [leaf.path for n in part.nodes if (leaf := get(n, Leaf)) is not None and leaf.path in packed_left]
            plan[part.name] = (dense, list(dict.fromkeys(packed)))
            left = {path: None for path in left if path not in set(dense)}
            packed_left -= set(packed)
        plan[parts[-1].name][0].extend(left)
        return plan

    def write(self, work: PartitionWork) -> None:
        """Write the shard of one partition: codes of what was solved, what transforms replaced, bytes of what stays."""
        dense, packed = self._dense[work.partition.name]
        if not dense and not packed:
            return
        tensors: dict[str, DiskTensor] = self._context.source.dense(
            dense, {path: work.weights[path].cpu() for path in work.altered.intersection(dense)}
        )
        for parts in in_parallel(lambda path: self._pack(path, work), packed, workers=work.workers):
            tensors |= parts
        for observer, scale in work.caches.items():
            module = self._context.source.names.disk_module(observer.consumers[0])
            tensors[f"{module}.{cache_scale(observer.purpose)}"] = scale.cpu()
        self._writer.add_shard(self._shard[work.partition.name], tensors)
        self._written += sum(tensor_bytes(tensor.dtype, tuple(tensor.shape)) for tensor in tensors.values())

    def _pack(self, path: str, work: PartitionWork) -> dict[str, Tensor]:
        """The tensors of one quantized linear by their keys on disk, on the CPU."""
        solved = work.solved.get(path)
        if solved is None:
            raise VerificationError(f"{path} has a scheme, but no pass solved it before it was to be written")
        scheme = scheme_of(self._quantized[f"{path}.weight"])
        assert scheme is not None
        parts = pack(
            solved.weight,
            scheme,
            input_scale=solved.input_scale,
            input_zero_point=solved.input_zero_point,
            input_global_scale=solved.input_global_scale,
        )
        prefix = disk_prefix(path, self._context.source)
        return {f"{prefix}.{name}": tensor.cpu() for name, tensor in parts.items()}

    def finish(self) -> None:
        """Check the bytes against the plan. Raises `VerificationError`."""
        predicted = self._context.report.total_bytes
        if self._written != predicted:
            raise VerificationError(
                f"{self._written} bytes of tensors were written, and {predicted} were predicted: "
                "the plan and the writer disagree, which is a defect of qcompiler"
            )

    def publish(self) -> None:
        """Write config and provenance, with what later passes reported, and make the folder the output."""
        report = self._context.report
        report.config_summary = self._config.summary
        # Equal inputs give equal folders, byte for byte, but for what stands under `timings`.
        timings = {
            "passes": {timing.name: timing.seconds for timing in report.timings},
            "layers": {row.path: row.seconds for row in report.layers if row.seconds is not None},
        }
        provenance = {**self._context.provenance, "report": report.as_dict(timings=False), "timings": timings}
        files = {"config.json": _json(self._model_config())}
        self._writer.finish(files, companions=self._context.source.folder, provenance=provenance)

    def abort(self) -> None:
        """Remove the partial folder; an old output stays."""
        self._writer.__exit__(None, None, None)

    def _model_config(self) -> dict[str, Any]:
        source = self._context.source
        config: dict[str, Any] = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = str(source.dtype).removeprefix("torch.")
        if untied(self._graph, source):
            config["tie_word_embeddings"] = False
        return {**config, "quantization_config": self._config.config}


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, default=str) + "\n"
