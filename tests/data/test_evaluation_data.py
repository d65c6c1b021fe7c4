"""Evaluation windows: contiguous, in order, of one text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from qcompiler.data import TokenData, load_evaluation
from qcompiler.errors import DataError
from tests.data.conftest import VOCABULARY

TEXT = "".join(f"This is sentence {i}.\n" for i in range(50))


def load(dataset: Path | None, tokenizer: Path | None, rows: Any = None, **options: Any) -> TokenData:
    return load_evaluation(
        dataset, tokenizer, vocab_size=VOCABULARY, rows=rows, **{"sequence_length": 32, "batch_tokens": 128, **options}
    )


def tokens(data: TokenData) -> list[int]:
    assert all(batch.token_mask.all() for batch in data.batches)
    return torch.cat([batch.input_ids.flatten() for batch in data.batches]).tolist()


def encoded(folder: Path, text: str) -> list[int]:
    return list(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])


def test_windows_in_order_are_the_tokens_of_the_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "evaluation.txt"
    path.write_text(TEXT)
    data = load(path, tokenizer_folder)
    whole = encoded(tokenizer_folder, TEXT)
    assert data.sequences == len(whole) // 32
    assert [tuple(batch.input_ids.shape) for batch in data.batches[:-1]] == [(4, 32)] * (len(data.batches) - 1)
    assert tokens(data) == whole[: data.sequences * 32]


def test_rows_of_text_are_one_text_joined_by_blank_lines(tokenizer_folder: Path) -> None:
    rows = [{"text": line} for line in ["", " = Title = \n", *TEXT.splitlines(keepends=True)]]
    whole = encoded(tokenizer_folder, "\n\n".join(row["text"] for row in rows))
    for form in (rows, Dataset.from_list(rows), [row["text"] for row in rows]):
        data = load(None, tokenizer_folder, form)
        assert tokens(data) == whole[: data.sequences * 32]


def test_rows_of_token_ids_are_concatenated_in_order() -> None:
    data = load(None, None, [list(range(i, i + 25)) for i in range(10)])
    joined = [token for i in range(10) for token in range(i, i + 25)]
    assert tokens(data) == joined[: 250 // 32 * 32]


def test_the_test_split_is_the_usual_one(tokenizer_folder: Path) -> None:
    splits = DatasetDict(train=Dataset.from_dict({"text": ["x" * 99]}), test=Dataset.from_dict({"text": [TEXT]}))
    assert tokens(load(None, tokenizer_folder, splits)) == tokens(load(None, tokenizer_folder, [TEXT]))


def test_the_number_of_sequences_can_be_limited(tokenizer_folder: Path) -> None:
    data = load(None, tokenizer_folder, [TEXT], sequences=3)
    assert (data.sequences, data.notes) == (3, ())
    assert tokens(data) == encoded(tokenizer_folder, TEXT)[:96]
    data = load(None, tokenizer_folder, [TEXT], sequences=300)
    assert data.notes == (f"{data.sequences} of 300 sequences: rows has no more",)


def test_the_window_caps_the_sequence_length(tokenizer_folder: Path) -> None:
    data = load(None, tokenizer_folder, [TEXT], sequence_length=2048, max_window=16)
    assert data.sequence_length == 16
    assert data.notes == ("sequence length capped at the model's window: 16, not 2048",)


def test_a_text_shorter_than_a_window_is_refused(tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="9 tokens in 1 rows, fewer than one sequence of 32"):
        load(None, tokenizer_folder, ["too", "few"])
