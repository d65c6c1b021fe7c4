"""A small trained language model with texts to calibrate and to evaluate it on, for trying things out offline."""

from importlib.resources import files
from pathlib import Path

from qcompiler.errors import CheckpointError

__all__ = ["calibration_text", "evaluation_text", "model_path"]


def model_path() -> Path:
    """The checkpoint's folder: a Llama of 3.4 million parameters in bf16, with its tokenizer."""
    return _installed("model")


def calibration_text() -> Path:
    """A UTF-8 file of prose and plays that the model was trained on."""
    return _installed("calibration.txt")


def evaluation_text() -> Path:
    """A UTF-8 file from the same books that neither the model nor its tokenizer has seen."""
    return _installed("evaluation.txt")


def _installed(name: str) -> Path:
    path = files(__name__) / name
    if not isinstance(path, Path):
        raise CheckpointError(f"{path} is inside an archive", hint="install qcompiler unpacked, as pip does")
    return path
