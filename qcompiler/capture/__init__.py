"""Capture: from a Hugging Face model to a `Graph` of raised leaves, each with its role."""

from qcompiler.capture.compare import capture_and_prove
from qcompiler.capture.graph import capture_graph

__all__ = ["capture_and_prove", "capture_graph"]
