"""qcompiler: a compiler for non-uniform quantization.

`compile` and `plan` are the API; `verify` checks a compiled checkpoint, `check_checkpoint` anyone's. Passes are written
against `GraphPass` and `StreamingPass`. Names are loaded on first use, so that importing a small part does not import
Transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.check import CheckReport, check_checkpoint
    from qcompiler.compiler import Plan, Result, compile, plan
    from qcompiler.data import CalibrationSpec
    from qcompiler.errors import QCompilerError
    from qcompiler.pipeline import Context, GraphPass, Pass, Pipeline, StreamingPass, load_pipeline
    from qcompiler.scheme import QuantSpec, Scheme
    from qcompiler.verification import Verification, verify

_HOME = {
    "CalibrationSpec": "qcompiler.data",
    "CheckReport": "qcompiler.check",
    "Context": "qcompiler.pipeline",
    "GraphPass": "qcompiler.pipeline",
    "Pass": "qcompiler.pipeline",
    "Pipeline": "qcompiler.pipeline",
    "Plan": "qcompiler.compiler",
    "QCompilerError": "qcompiler.errors",
    "QuantSpec": "qcompiler.scheme",
    "Result": "qcompiler.compiler",
    "Scheme": "qcompiler.scheme",
    "StreamingPass": "qcompiler.pipeline",
    "Verification": "qcompiler.verification",
    "check_checkpoint": "qcompiler.check",
    "compile": "qcompiler.compiler",
    "load_pipeline": "qcompiler.pipeline",
    "plan": "qcompiler.compiler",
    "verify": "qcompiler.verification",
}

__all__ = [
    "CalibrationSpec",
    "CheckReport",
    "Context",
    "GraphPass",
    "Pass",
    "Pipeline",
    "Plan",
    "QCompilerError",
    "QuantSpec",
    "Result",
    "Scheme",
    "StreamingPass",
    "Verification",
    "check_checkpoint",
    "compile",
    "load_pipeline",
    "plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qcompiler' has no attribute {name!r}")
    from qcompiler.requirements import check_transformers  # here: the command line answers whoever interrupts imports

    check_transformers()
    return getattr(import_module(_HOME[name]), name)
