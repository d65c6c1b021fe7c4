"""What to calibrate with, as a user writes it in a pipeline or on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from qcompiler.arguments import wrong_arguments

DEFAULT_BATCH_TOKENS = 16384


class CalibrationSpec(BaseModel):
    """Which rows become calibration samples, and how.

    `dataset` is a local file (.txt, .jsonl, .json, .csv, .parquet, .arrow), a folder of such files of one format, a
    folder written by `datasets.save_to_disk`, or a hub id `owner/name`; `None` where rows are handed over in Python.

    Unpacked, each row is one sample, cut after `sequence_length` tokens. Packed, whole rows are joined with
    end-of-text tokens and cut into samples of exactly `sequence_length`. A text file has no rows: packed, which is its
    default, each file is one document; unpacked, each line that is not blank is a row.

    Raises `ConfigError` for arguments that mean nothing, where it is made in Python.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str | Path | None = None
    config_name: str | None = None
    """Which configuration of a hub dataset (`wikitext-2-raw-v1`)."""
    split: str | None = None
    """Default: `train`, where there are splits at all."""
    text_column: str | None = None
    """Default: the first of `input_ids`, `messages`, `text` that is there, else the only column of strings."""
    samples: PositiveInt = 512
    sequence_length: PositiveInt = 2048
    packing: bool | None = None
    """Default: only text files are packed."""
    shuffle: bool = True
    """Rows in an order drawn from `seed`; what is streamed (files but .txt, the hub) is shuffled in a buffer."""
    seed: NonNegativeInt = 0
    batch_tokens: PositiveInt = DEFAULT_BATCH_TOKENS
    """A batch holds at most this many tokens, padding included (and at least one sample)."""

    if not TYPE_CHECKING:  # checkers see the arguments by their names

        def __init__(self, **options: Any) -> None:
            try:
                super().__init__(**options)
            except ValidationError as error:
                raise wrong_arguments(error, type(self)) from error

        # So that a spec within a pipeline is validated without it, and its mistakes get their places in the file.
        __init__.__pydantic_base_init__ = True
