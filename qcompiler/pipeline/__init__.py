"""Passes and pipelines: the protocol, the registry, the YAML form and the manager that runs them."""

from qcompiler.pipeline.base import Context, GraphPass, PartitionStep, PartitionWork, Pass, StreamingPass
from qcompiler.pipeline.pipeline import Pipeline, load_pipeline, parse_pipeline, print_pipeline

__all__ = [
    "Context",
    "GraphPass",
    "PartitionStep",
    "PartitionWork",
    "Pass",
    "Pipeline",
    "StreamingPass",
    "load_pipeline",
    "parse_pipeline",
    "print_pipeline",
]
