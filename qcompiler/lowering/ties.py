"""What becomes of tied parameters, a head and its embedding, in the checkpoint that is written."""

from __future__ import annotations

from qcompiler.ir.graph import Graph
from qcompiler.lowering.predict import quantized_paths
from qcompiler.report import Report
from qcompiler.source import ModelSource
from qcompiler.tensors import tensor_bytes


def untied(graph: Graph, source: ModelSource) -> dict[str, str]:
    """Paths that the model's config ties, and that are written with values of their own; each with why, in words.

    Where there is one, the written config must say `tie_word_embeddings: false`: Transformers compares stored
    duplicates before it ties them, but other runtimes believe the config, and never load the head. Without weight
    files nothing is written, and nothing is said.
    """
    if not source.has_weights:
        return {}
    found = {path: f"the files hold other values for it than for {other}" for path, other in source.names.apart.items()}
    for path in quantized_paths(graph):
        if path in source.names.aliases:
            found[path] = f"it is quantized, and {source.names.aliases[path]} is not"
    return found


def tell_ties(graph: Graph, source: ModelSource, report: Report) -> None:
    """Note what is tied no more, and which stored duplicates a plan took for equal without reading them."""
    if getattr(source.config, "tie_word_embeddings", False):
        for path, because in untied(graph, source).items():
            text = f"{path} is not tied, though the config says so: {because}; tie_word_embeddings is written as false"
            (report.warning if path in source.names.apart else report.info)(text)
    if source.has_weights and (assumed := source.names.assumed):
        dense = [source.names.spec(path) for path in assumed if path not in quantized_paths(graph)]
        more = sum(tensor_bytes(*spec) for spec in dense)
        apart = f", and writes {more} bytes more where they differ" if more else ""
        report.info(
            f"stored twice, and taken for equal, as the model ties them: {', '.join(assumed)} "
            f"(compile compares them{apart})"
        )
