"""Targets: what each runtime can load, as data, and the check of a model against one of them."""

from qcompiler.targets.check import MODEL, Violation, check, kernel, notes
from qcompiler.targets.model import Target, fused_tables, load_target, target_names

__all__ = ["MODEL", "Target", "Violation", "check", "fused_tables", "kernel", "load_target", "notes", "target_names"]
