"""What to calibrate with, as a user writes it in a pipeline or on the command line."""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeInt, PositiveInt

from qcompiler.options import Options

CPU_BATCH_TOKENS = 1024
"""What caches hold of: larger batches are no faster there, and take more memory."""
DEVICE_BATCH_TOKENS = 16384
"""Few calls, each large."""


class CalibrationSpec(Options):
    """Which rows become calibration samples, and how.

    `dataset` is a local file (.txt, .jsonl, .json, .csv, .parquet, .arrow), a folder of such files of one format, a
    folder written by `datasets.save_to_disk`, or a hub id `owner/name`; `None` where rows are handed over in Python.

    Unpacked, each row is one sample, cut after `sequence_length` tokens. Packed, whole rows are joined with
    end-of-text tokens and cut into samples of exactly `sequence_length`. A text file has no rows: packed, which is its
    default, each file is one document; unpacked, each line that is not blank is a row.

    Raises `ConfigError` for arguments that mean nothing, where it is made in Python.
    """

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
    batch_tokens: PositiveInt | None = None
    """A batch holds at most this many tokens, padding included (and at least one sample). Default: 1024 where the
    model runs on a CPU, else 16384."""
