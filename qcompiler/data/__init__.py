"""Calibration and evaluation data: from files, hub ids or Python objects to batches of token ids."""

from qcompiler.data.batches import TokenBatch, TokenData
from qcompiler.data.load import load_calibration, load_evaluation
from qcompiler.data.spec import CalibrationSpec

__all__ = ["CalibrationSpec", "TokenBatch", "TokenData", "load_calibration", "load_evaluation"]
