"""What the tests of calibration data share: a load of little data, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from qcompiler.data import CalibrationSpec, TokenData, load_calibration
from tests.data.conftest import VOCABULARY

TEXTS = [f"text number {i} " + "x" * (7 * i % 23) for i in range(40)]


def spec(dataset: str | Path | None = None, **options: Any) -> CalibrationSpec:
    return CalibrationSpec(**{"dataset": dataset, "samples": 40, "sequence_length": 64, **options})


def load(
    spec: CalibrationSpec, tokenizer: Path | None = None, rows: Any = None, max_window: int | None = None
) -> TokenData:
    return load_calibration(spec, tokenizer, vocab_size=VOCABULARY, max_window=max_window, rows=rows)


def sequences(data: TokenData) -> list[tuple[int, ...]]:
    return [
        tuple(ids[mask].tolist())
        for batch in data.batches
        for ids, mask in zip(batch.input_ids, batch.token_mask, strict=True)
    ]


def encoded(folder: Path, texts: list[str]) -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tuple(tokenizer(text)["input_ids"]) for text in texts]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            Dataset.from_list(rows).to_csv(path)
        case ".parquet":
            Dataset.from_list(rows).to_parquet(path)
        case ".arrow":
            Dataset.from_list(rows).save_to_disk(path.parent / "saved")
            next((path.parent / "saved").glob("*.arrow")).rename(path)
    return path
