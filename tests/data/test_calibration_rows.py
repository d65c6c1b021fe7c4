"""Where the rows of calibration data come from, and which of their columns are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from qcompiler.errors import DataError
from tests.data.calibration import TEXTS, encoded, load, sequences, spec, write

# --- where rows come from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_each_file_format_gives_the_tokens_of_its_text_column(
    tmp_path: Path, tokenizer_folder: Path, suffix: str
) -> None:
    path = write(tmp_path / f"rows{suffix}", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])
    data = load(spec(path), tokenizer_folder)
    assert sorted(sequences(data)) == sorted(encoded(tokenizer_folder, TEXTS))
    assert data.notes == ()


def test_a_saved_dataset_and_the_dataset_itself_give_the_same_data(tmp_path: Path, tokenizer_folder: Path) -> None:
    dataset = Dataset.from_dict({"text": TEXTS})
    dataset.save_to_disk(tmp_path / "saved")
    from_disk = load(spec(tmp_path / "saved", samples=10), tokenizer_folder)
    assert from_disk.fingerprint == load(spec(samples=10), tokenizer_folder, dataset).fingerprint
    assert from_disk.fingerprint == load(spec(samples=10), tokenizer_folder, TEXTS).fingerprint


def test_a_folder_reads_only_the_split_its_file_names_tell(tmp_path: Path, tokenizer_folder: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", [{"text": "a"}, {"text": "b"}] * 10)
    write(tmp_path / "train-00001-of-00002.parquet", [{"text": "c"}] * 10)
    write(tmp_path / "test_sft-00000-of-00001.parquet", [{"text": "z"}] * 40)
    (tmp_path / "README.md").write_text("not data")

    def texts(split: str | None) -> set[tuple[int, ...]]:
        return set(sequences(load(spec(tmp_path, split=split, sequence_length=8), tokenizer_folder)))

    assert texts(None) == texts("train") == set(encoded(tokenizer_folder, ["a", "b", "c"]))
    assert texts("test") == texts("test_sft") == set(encoded(tokenizer_folder, ["z"]))
    for absent in ("validation", "sft_train"):
        with pytest.raises(DataError, match=rf"no file of split '{absent}'(.|\n)*file names: test, train"):
            texts(absent)


def test_a_folder_whose_names_tell_no_split_is_read_whole(tmp_path: Path, tokenizer_folder: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / f"{name}.jsonl", [{"text": name * 30}])
    data = load(spec(tmp_path), tokenizer_folder)
    assert data.sequences == 2


def test_a_folder_of_mixed_formats_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "a"}])
    write(tmp_path / "b.csv", [{"text": "b"}])
    with pytest.raises(DataError, match=r"mixes \.csv, \.jsonl files"):
        load(spec(tmp_path), tokenizer_folder)


def test_splits_of_a_saved_dataset_are_chosen_and_listed(tmp_path: Path, tokenizer_folder: Path) -> None:
    splits = DatasetDict(train=Dataset.from_dict({"text": TEXTS}), other=Dataset.from_dict({"text": ["only"] * 20}))
    splits.save_to_disk(tmp_path / "saved")
    for source, rows in ((tmp_path / "saved", None), (None, splits)):
        assert load(spec(source), tokenizer_folder, rows).sequences == 40
        assert load(spec(source, split="other"), tokenizer_folder, rows).sequences == 20
        with pytest.raises(DataError, match=r"no split 'othr'; did you mean 'other'\?(.|\n)*splits: train, other"):
            load(spec(source, split="othr"), tokenizer_folder, rows)


def test_a_split_of_what_has_none_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    for source, rows in ((path, None), (None, TEXTS), (None, Dataset.from_dict({"text": TEXTS}))):
        with pytest.raises(DataError, match="split 'train' was asked for"):
            load(spec(source, split="train"), tokenizer_folder, rows)


def test_a_hub_dataset_is_streamed_from_the_split_and_configuration_asked_for(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, str, bool]] = []

    def hub(path: str, name: str | None, *, split: str, streaming: bool, cache_dir: str) -> datasets.IterableDataset:
        asked.append((path, name, split, streaming))
        return Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = load(spec("owner/name", config_name="en"), tokenizer_folder)
    load(spec("owner/name", split="validation"), tokenizer_folder)
    assert asked == [("owner/name", "en", "train", True), ("owner/name", None, "validation", True)]
    assert sorted(sequences(data)) == sorted(encoded(tokenizer_folder, TEXTS))


def test_a_configuration_of_what_has_none_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    for source, rows in ((path, None), (None, TEXTS)):
        with pytest.raises(DataError, match="has no configurations, but 'en' was asked for"):
            load(spec(source, config_name="en"), tokenizer_folder, rows)


def test_python_rows_may_be_texts_mappings_ids_tensors_or_a_generator(tokenizer_folder: Path) -> None:
    texts = ["short", "a longer text that follows" * 3]
    ids = [list(one) for one in encoded(tokenizer_folder, texts)]
    forms: list[Any] = [
        texts,
        [{"text": text} for text in texts],
        ids,
        [torch.tensor(one) for one in ids],
        [np.array(one) for one in ids],
        [{"input_ids": torch.tensor(one)} for one in ids],
        (text for text in texts),
        Dataset.from_dict({"input_ids": ids}).with_format("torch"),
        Dataset.from_dict({"text": texts}).to_iterable_dataset(),
    ]
    found = [load(spec(shuffle=False), tokenizer_folder, rows).fingerprint for rows in forms]
    assert len(set(found)) == 1


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", [{"input_ids": list(range(n, n + 20))} for n in range(50)])
    data = load(spec(path, shuffle=False), tokenizer=None)
    assert sequences(data) == [tuple(range(n, n + 20)) for n in range(40)]


def test_padding_that_an_attention_mask_marks_is_dropped() -> None:
    rows = [{"input_ids": [0, 0, *range(5, 40)], "attention_mask": [0, 0, *[1] * 35]}] * 2
    assert sequences(load(spec(), rows=rows)) == [tuple(range(5, 40))] * 2


# --- columns and chats ----------------------------------------------------------------------------------------------


def test_the_only_column_of_strings_is_found(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"id": i, "story": text} for i, text in enumerate(TEXTS)])
    assert sorted(sequences(load(spec(path), tokenizer_folder))) == sorted(encoded(tokenizer_folder, TEXTS))


def test_the_column_asked_for_wins(tokenizer_folder: Path) -> None:
    rows = [{"text": "no", "summary": text} for text in TEXTS]
    data = load(spec(text_column="summary"), tokenizer_folder, rows)
    assert sorted(sequences(data)) == sorted(encoded(tokenizer_folder, TEXTS))


def test_a_missing_column_is_refused_with_those_there_are(tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'txt'; did you mean 'text'\?(.|\n)*columns: id, text"):
        load(spec(text_column="txt"), tokenizer_folder, [{"id": 1, "text": "a"}])


def test_two_columns_of_strings_are_not_guessed_between(tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match=r"not clear(.|\n)*columns: question, answer"):
        load(spec(), tokenizer_folder, [{"question": "a", "answer": "b"}])


def test_a_later_row_without_the_column_is_named(tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="row 1 of rows has no column 'text'"):
        load(spec(shuffle=False), tokenizer_folder, [{"text": "a"}, {"other": "b"}])


def test_chats_go_through_the_template_without_a_second_begin_token(tmp_path: Path, tokenizer_folder: Path) -> None:
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day", "name": "Ann"}]
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "messages": chat}] * 3)  # Arrow adds name: null to the first
    (ids, *_) = sequences(load(spec(path, sequence_length=60), tokenizer_folder))
    assert AutoTokenizer.from_pretrained(tokenizer_folder).decode(ids) == "user: Hello</s>assistant Ann: Good day</s>"
    assert sequences(load(spec(sequence_length=60), tokenizer_folder, [chat] * 3))[0] == ids


def test_chats_without_a_template_are_refused(templateless_folder: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hello"}]}]
    with pytest.raises(DataError, match="no chat template"):
        load(spec(), templateless_folder, rows)


def test_what_a_template_raises_names_the_row(tokenizer_folder: Path) -> None:
    rows = [[{"role": "user", "content": "x"}], [{"role": "wizard", "content": "x"}]]
    with pytest.raises(DataError, match=r"row 1 of rows cannot be encoded: .*unknown role"):
        load(spec(shuffle=False), tokenizer_folder, rows)


@pytest.mark.parametrize("row", [[1.5, 2.5], [[1, 2], [3, 4]], 7, {"input_ids": 7}])
def test_a_row_of_no_known_form_is_named(row: Any) -> None:
    with pytest.raises(DataError, match="row 0 of rows cannot be encoded"):
        load(spec(), rows=[row])
