"""Every way to break the rules of a stage: importing the modules here registers their cases."""

from __future__ import annotations

from tests.ir.violations import lowered, observers, rescales, schemes, structure
from tests.ir.violations.case import CASES, Case

__all__ = ["CASES", "Case", "lowered", "observers", "rescales", "schemes", "structure"]
