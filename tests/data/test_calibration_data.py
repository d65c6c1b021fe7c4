"""Calibration data end to end: selection, packing, and what is refused."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qcompiler.data import CalibrationSpec
from qcompiler.data.sources import SHUFFLE_BUFFER, in_order
from qcompiler.errors import ConfigError, DataError
from tests.data.calibration import TEXTS, encoded, load, sequences, spec, write
from tests.data.conftest import VOCABULARY

# --- samples, lengths, packing --------------------------------------------------------------------------------------


def test_long_rows_are_cut_and_the_note_counts_them(tokenizer_folder: Path) -> None:
    data = load(spec(sequence_length=10, samples=2), tokenizer_folder, ["y" * 50, "short"])
    assert [len(ids) for ids in sequences(data)] == [10, 6]
    assert data.notes == ("cut 1 of 2 samples to 10 tokens",)


def test_the_models_window_caps_the_sequence_length_and_says_so(tokenizer_folder: Path) -> None:
    data = load(spec(sequence_length=2048, samples=1), tokenizer_folder, ["y" * 50], max_window=32)
    assert data.sequence_length == 32
    assert data.tokens == 32
    assert "sequence length capped at the model's window: 32, not 2048" in data.notes
    data = load(spec(sequence_length=16, samples=1), tokenizer_folder, ["y" * 15], max_window=32)
    assert (data.sequence_length, data.notes) == (16, ())


def test_fewer_tokens_than_one_sequence_are_refused_though_there_are_as_many_rows_as_asked(
    tokenizer_folder: Path,
) -> None:
    with pytest.raises(DataError, match=r"^rows has 12 tokens in 4 rows, fewer than one sequence of 16\n.*sequence"):
        load(spec(sequence_length=16, samples=4), tokenizer_folder, ["hi"] * 4)


def test_fewer_samples_than_asked_are_noted(tokenizer_folder: Path) -> None:
    data = load(spec(samples=512), tokenizer_folder, [*TEXTS, "", "  ", None])
    assert data.sequences == 40
    assert data.notes == ("40 of 512 samples: rows has no more", "skipped 3 empty rows of 43")


def test_a_text_file_is_packed_and_read_from_end_to_end(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(2000)))
    data = load(spec(path, samples=20), tokenizer_folder)
    whole = encoded(tokenizer_folder, [path.read_text()])[0]
    starts = [_find(whole, ids) for ids in sequences(data)]
    assert [len(ids) for ids in sequences(data)] == [64] * 20
    assert all(start % 64 == 0 for start in starts)
    assert starts == sorted(set(starts))
    assert starts[-1] > len(whole) / 2, "samples are not only the beginning"
    in_sequence = load(spec(path, samples=20, shuffle=False), tokenizer_folder)
    assert [_find(whole, ids) for ids in sequences(in_sequence)] == list(range(0, 20 * 64, 64))


def _find(whole: tuple[int, ...], part: tuple[int, ...]) -> int:
    return next(i for i in range(len(whole)) if whole[i : i + len(part)] == part)


def test_an_unpacked_text_file_gives_a_sample_per_line_that_is_not_blank(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n\n".join(TEXTS))
    data = load(spec(path, packing=False), tokenizer_folder)
    assert sorted(sequences(data)) == sorted(encoded(tokenizer_folder, TEXTS))


@given(
    documents=st.lists(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=20), min_size=1, max_size=20),
    length=st.integers(1, 12),
)
def test_packed_token_ids_are_the_concatenation_of_the_documents(documents: list[list[int]], length: int) -> None:
    joined = [token for document in documents for token in document]
    options = spec(sequence_length=length, packing=True, shuffle=False, samples=1000)
    if len(joined) < length:
        with pytest.raises(DataError, match=f"{len(joined)} tokens in {len(documents)} rows"):
            load(options, rows=documents)
        return
    packed = sequences(load(options, rows=documents))
    assert [token for ids in packed for token in ids] == joined[: len(joined) // length * length]


def test_packed_texts_are_separated_by_end_of_text(tokenizer_folder: Path) -> None:
    data = load(spec(packing=True, shuffle=False, sequence_length=10, samples=1), tokenizer_folder, ["abc", "defgh"])
    assert AutoTokenizer.from_pretrained(tokenizer_folder).decode(sequences(data)[0]) == "<s>abc</s><s>defg"


def test_packed_chats_do_not_end_twice(tokenizer_folder: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    data = load(spec(packing=True, sequence_length=18, samples=1), tokenizer_folder, [chat, chat])
    assert AutoTokenizer.from_pretrained(tokenizer_folder).decode(sequences(data)[0]) == "user: Hi</s>user: Hi</s>"


# --- determinism ----------------------------------------------------------------------------------------------------


def test_the_seed_decides_which_rows_are_taken(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    for dataset, rows in ((path, None), (None, TEXTS)):
        taken = [load(spec(dataset, samples=8, seed=seed), tokenizer_folder, rows) for seed in (0, 0, 1)]
        assert taken[0].fingerprint == taken[1].fingerprint
        assert set(sequences(taken[0])) != set(sequences(taken[2]))
    first = load(spec(samples=8, shuffle=False), tokenizer_folder, TEXTS)
    assert sorted(sequences(first)) == sorted(encoded(tokenizer_folder, TEXTS[:8]))


@given(count=st.integers(0, 60), seed=st.integers(0, 9))
def test_shuffling_is_a_permutation_that_keeps_row_numbers(count: int, seed: int) -> None:
    rows = [f"row {i}" for i in range(count)]
    for shape in (rows, iter(rows)):
        shuffled = list(in_order(shape, seed))
        assert sorted(shuffled) == list(enumerate(rows))
    assert list(in_order(rows, None)) == list(enumerate(rows))


def test_a_stream_longer_than_the_buffer_is_shuffled_without_losing_rows() -> None:
    count = SHUFFLE_BUFFER + 500
    shuffled = list(in_order(iter(range(count)), 0))
    assert sorted(shuffled) == [(i, i) for i in range(count)]
    assert shuffled != sorted(shuffled)


def test_only_the_rows_taken_are_read_from_a_table() -> None:
    class Table:
        read = 0

        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: int) -> list[int]:
            self.read += 1
            return [5] * 64

        def __iter__(self) -> Iterator[list[int]]:
            raise AssertionError("a table is not iterated over")

    table = Table()
    assert load(spec(samples=8), rows=table).sequences == 8
    assert table.read <= 9


# --- what is refused ------------------------------------------------------------------------------------------------


def test_empty_data_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="has no tokens"):
        load(spec(tmp_path / "empty.txt"), tokenizer_folder)
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        load(spec(tmp_path / "empty.jsonl"), tokenizer_folder)
    with pytest.raises(DataError, match="has no rows"):
        load(spec(), tokenizer_folder, [])
    with pytest.raises(DataError, match=r"has no tokens: its rows are empty \(2\)"):
        load(spec(), tokenizer_folder, ["", " "])


@pytest.mark.parametrize("packing", [True, False])
def test_fewer_tokens_than_one_sequence_are_refused_with_counts(tokenizer_folder: Path, packing: bool) -> None:
    with pytest.raises(DataError, match="rows has 8 tokens in 2 rows, fewer than one sequence of 64"):
        load(spec(packing=packing), tokenizer_folder, ["abc", "def"])


@pytest.mark.parametrize("bad", [VOCABULARY, -1])
def test_a_token_id_outside_the_vocabulary_names_the_row(bad: int) -> None:
    with pytest.raises(DataError, match=f"row 1 of rows has token id {bad}, but the model's vocabulary has 259"):
        load(spec(shuffle=False), rows=[[1] * 64, [1, bad]])


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text needs a tokenizer"):
        load(spec(), None, TEXTS)
    with pytest.raises(DataError, match="no tokenizer can be loaded from"):
        load(spec(), tmp_path, TEXTS)


def test_damaged_files_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{broken")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    (tmp_path / "bad.txt").write_bytes(b"ab\xff\xfe")
    (tmp_path / "code.py").write_text("print('not data')")
    for name in ("bad.jsonl", "bad.parquet"):
        with pytest.raises(DataError, match=rf"{name} cannot be read"):
            load(spec(tmp_path / name), tokenizer_folder)
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 2\)"):
        load(spec(tmp_path / "bad.txt"), tokenizer_folder)
    with pytest.raises(DataError, match="of no format that can be read"):
        load(spec(tmp_path / "code.py"), tokenizer_folder)


@pytest.mark.parametrize("name", ["text", "json", "missing.jsonl", "folder/missing.jsonl", "/no/such/folder"])
def test_a_path_that_does_not_exist_is_not_looked_up_elsewhere(
    name: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path / "rows.jsonl", [{"text": "found by accident"}]).parent)
    with pytest.raises(DataError, match=f"there is no file or folder '{name}'"):
        load(spec(name), tokenizer_folder)


def test_a_hub_that_cannot_be_reached_is_a_data_error(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"dataset 'owner/name' of the Hugging Face hub cannot be read(.|\n)*network"):
        load(spec("owner/name"), tokenizer_folder)


def test_one_string_or_mapping_is_not_taken_for_rows(tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="rows is one string"):
        load(spec(), tokenizer_folder, "a text")
    with pytest.raises(DataError, match="rows is one mapping"):
        load(spec(), tokenizer_folder, {"text": TEXTS})
    with pytest.raises(DataError, match="no data"):
        load(spec(), tokenizer_folder)
    with pytest.raises(DataError, match="both"):
        load(spec("x.txt"), tokenizer_folder, TEXTS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": -1}, "samples=-1: input should be greater than 0"),
        ({"sequence_length": 0}, "sequence_length=0: input should be greater than 0"),
        ({"seed": -1}, "seed=-1: input should be greater than or equal to 0"),
        ({"sampels": 8}, "sampels: CalibrationSpec has no such argument; did you mean 'samples'"),
        ({"shuffle": "perhaps", "seed": None}, "shuffle='perhaps': "),
    ],
)
def test_a_spec_that_means_nothing_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CalibrationSpec(**options)
    lines = caught.value.message.splitlines()
    assert lines[0].startswith(said)
    assert len(lines) == len(options)
    assert str(caught.value.hint).startswith("CalibrationSpec takes dataset, config_name, ")


# --- what is left behind --------------------------------------------------------------------------------------------


def test_loading_leaves_no_files_threads_or_changed_settings(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.parquet", [{"text": text} for text in TEXTS])
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    datasets.enable_progress_bars()
    threads = threading.active_count()
    capfd.readouterr()
    load(spec(path, samples=3), tokenizer_folder)
    with pytest.raises(DataError):
        load(spec(path, text_column="nope"), tokenizer_folder)
    assert not cache.exists()
    assert not list(temporary.iterdir())
    assert threading.active_count() == threads
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


def test_a_file_that_breaks_off_is_refused_and_nothing_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`datasets` logs an error, and raises it: who calls is to be told once."""
    file = write(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    file.write_text(file.read_text()[:-9])
    logger, verbosity = logging.getLogger("datasets"), datasets.logging.get_verbosity()
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(DataError, match=r"rows.jsonl cannot be read"):
            load(spec(file))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert datasets.logging.get_verbosity() == verbosity


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_does_not_mean_this_folder(name: str) -> None:
    with pytest.raises(DataError, match="the name of the dataset is empty"):
        load(spec(name))
