"""Check: what loaders will not load, or load wrong, in any compressed-tensors checkpoint; weights are not read."""

from qcompiler.check.findings import KINDS, CheckReport, Finding, Severity
from qcompiler.check.run import check_checkpoint

__all__ = ["KINDS", "CheckReport", "Finding", "Severity", "check_checkpoint"]
