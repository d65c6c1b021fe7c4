"""Errors a user meets. Each names the thing that is wrong and the mend; the CLI prints it and exits with 2."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


class QCompilerError(Exception):
    """Base of every error raised on purpose. `hint` says what to do about it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ConfigError(QCompilerError):
    """A pipeline, pass option, scheme or rule that is wrong in itself."""


class CaptureError(QCompilerError):
    """The model cannot be captured as a graph, or the graph does not compute what the model computes."""


class ModelConfigError(CaptureError):
    """Transformers knows the kind of the model, and refuses what config.json says of it."""


class SizeError(QCompilerError):
    """A model beyond every size that models have; see `qcompiler.limits`."""


class CheckpointError(QCompilerError):
    """An input checkpoint that is damaged, incomplete or unsafe; or an output that cannot be written."""


class OutputError(QCompilerError):
    """Standard output is closed, or takes no more."""


class DataError(QCompilerError):
    """Calibration or evaluation data that cannot be used."""


class RuleError(QCompilerError):
    """A rule that matches nothing, contradicts another rule, or splits a fusion group."""


class LegalityError(QCompilerError):
    """The annotated graph asks for something that the target cannot load."""


class VerificationError(QCompilerError):
    """A graph between two passes breaks its stage's spec, or a written checkpoint is not what was compiled."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known words, or an empty string."""
    near = get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def in_brief(error: Exception) -> str:
    """The kind of an error of somebody else's code and its first line: some go on for pages, with a whole config."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    first = re.sub(r" \w+ \{$", "", first)  # where an object begins
    return f"{type(error).__name__}: {first[:200]}".removesuffix(": ")


def printable(text: str) -> str:
    """Without what would move a terminal's cursor or break a stream: names in files are whatever their writer liked."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
