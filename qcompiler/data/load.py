"""The two ways data is used: samples to calibrate with, and contiguous windows to measure perplexity on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

from qcompiler.data.batches import TokenData, build
from qcompiler.data.encode import LazyTokenizer, RowEncoder
from qcompiler.data.sources import in_order, open_source
from qcompiler.data.spec import CPU_BATCH_TOKENS, CalibrationSpec
from qcompiler.errors import DataError


def load_calibration(
    spec: CalibrationSpec,
    tokenizer_source: str | Path | None,
    *,
    vocab_size: int,
    max_window: int | None = None,
    rows: Iterable[Any] | None = None,
    trust_remote_code: bool = False,
) -> TokenData:
    """Calibration samples as `spec` asks for them, of at most `max_window` tokens (the model's window).

    `rows` takes the place of `spec.dataset`: an iterable of strings, chats, token-id lists or mappings of these, or a
    `datasets` object. `tokenizer_source` (folder or hub id) is loaded only where there is text. The same arguments
    give the same data. Raises `DataError` on data that cannot be read, is empty, has fewer tokens in all than one
    sequence, or has token ids that the model does not know.
    """
    length, notes = _capped(spec.sequence_length, max_window)
    seed = spec.seed if spec.shuffle else None
    with open_source(spec.dataset, rows, config_name=spec.config_name, split=spec.split, usual_split="train") as source:
        packing = source.documents if spec.packing is None else spec.packing
        by_line = source.documents and not packing
        numbered = in_order(_lines(source.rows) if by_line else source.rows, seed)
        tokenizer = LazyTokenizer(tokenizer_source, trust_remote_code=trust_remote_code)
        reading = _Reading.start(numbered, source.name, spec.text_column, tokenizer, vocab_size)
        if packing:
            windows = _pack(reading, length, enough=spec.samples)
            samples = windows if seed is None else _choose(windows, spec.samples, seed)
        else:
            samples = list(islice(reading, spec.samples))
    samples = samples[: spec.samples]
    if not samples or reading.tokens < length:
        raise reading.too_short(length)
    if len(samples) < spec.samples:
        notes.append(f"{len(samples)} of {spec.samples} samples: {source.name} has no more")
    if reading.empty:
        notes.append(f"skipped {reading.empty} empty rows of {reading.rows}")
    cut = sum(len(ids) > length for ids in samples)
    if cut:
        notes.append(f"cut {cut} of {len(samples)} samples to {length} tokens")
    samples = [ids[:length] for ids in samples]
    return build(samples, batch_tokens=spec.batch_tokens or CPU_BATCH_TOKENS, sequence_length=length, notes=notes)


def load_evaluation(
    dataset: str | Path | None,
    tokenizer_source: str | Path | None,
    *,
    sequence_length: int,
    vocab_size: int,
    max_window: int | None = None,
    rows: Iterable[Any] | None = None,
    config_name: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    sequences: int | None = None,
    batch_tokens: int = CPU_BATCH_TOKENS,
    trust_remote_code: bool = False,
) -> TokenData:
    """Contiguous windows of `sequence_length` tokens that do not overlap: the first `sequences`, or all there are.

    Rows of text are joined by blank lines and tokenized as one text, as perplexity on WikiText is measured since GPTQ
    (Frantar et al., 2022); other rows are packed in order. The data is read whole, and what is left after the last
    full window is dropped. The split is `test` unless another is named. Raises `DataError` as `load_calibration` does.
    """
    length, notes = _capped(sequence_length, max_window)
    with open_source(dataset, rows, config_name=config_name, split=split, usual_split="test") as source:
        tokenizer = LazyTokenizer(tokenizer_source, trust_remote_code=trust_remote_code)
        reading = _Reading.start(in_order(source.rows, None), source.name, text_column, tokenizer, vocab_size)
        reading.join_texts()
        windows = _pack(reading, length, enough=sequences)
    if not windows:
        raise reading.too_short(length)
    if sequences is not None and len(windows) < sequences:
        notes.append(f"{len(windows)} of {sequences} sequences: {source.name} has no more")
    return build(windows[:sequences], batch_tokens=batch_tokens, sequence_length=length, notes=notes)


@dataclass(slots=True)
class _Reading:
    """The encoded rows of a source that are not empty, and a count of what went by."""

    numbered: Iterable[tuple[int, Any]]
    encoder: RowEncoder
    rows: int = 0
    empty: int = 0
    tokens: int = 0

    @classmethod
    def start(
        cls,
        numbered: Iterator[tuple[int, Any]],
        name: str,
        column: str | None,
        tokenizer: LazyTokenizer,
        vocab_size: int,
    ) -> _Reading:
        """Looks at the first row to see what rows are. Raises `DataError` if there is none."""
        first = next(numbered, None)
        if first is None:
            raise DataError(f"{name} has no rows", hint="check path and split, and how the data was written")
        encoder = RowEncoder.for_rows_like(
            first[1], name=name, column=column, tokenizer=tokenizer, vocab_size=vocab_size
        )
        return cls(chain([first], numbered), encoder)

    def __iter__(self) -> Iterator[list[int]]:
        for number, row in self.numbered:
            ids = self.encoder(number, row)
            self.rows += 1
            self.tokens += len(ids)
            if ids:
                yield ids
            else:
                self.empty += 1

    def join_texts(self) -> None:
        """Makes one row of all, if all are text."""
        rows = list(self.numbered)
        values = [self.encoder.value(number, row) for number, row in rows]
        if all(value is None or isinstance(value, str) for value in values):
            rows = [(0, "\n\n".join(value or "" for value in values))]
            self.encoder = replace(self.encoder, column=None)
        self.numbered = rows

    def too_short(self, length: int) -> DataError:
        name = self.encoder.name
        if self.tokens == 0:
            return DataError(
                f"{name} has no tokens: its rows are empty ({self.rows})",
                hint="check how it was written, or read another column: --text-column (Python: text_column)",
            )
        return DataError(
            f"{name} has {self.tokens} tokens in {self.rows} rows, fewer than one sequence of {length}",
            hint="give more data, or a smaller --sequence-length (Python: sequence_length)",
        )


def _capped(sequence_length: int, max_window: int | None) -> tuple[int, list[str]]:
    """The sequence length to use, and the note that it is not the one asked for."""
    if max_window is None or sequence_length <= max_window:
        return sequence_length, []
    return max_window, [f"sequence length capped at the model's window: {max_window}, not {sequence_length}"]


def _lines(documents: Iterable[str]) -> list[str]:
    return [line for document in documents for line in document.splitlines() if line.strip()]


def _pack(reading: _Reading, length: int, *, enough: int | None) -> list[list[int]]:
    """Documents, each followed by end-of-text, cut into full windows; no more are read once there are `enough`."""
    windows: list[list[int]] = []
    rest: list[int] = []
    for ids in reading:
        end = reading.encoder.tokenizer.end_of_text()
        rest += ids if ids[-1:] == end else ids + end
        full = len(rest) // length * length
        windows += [rest[start : start + length] for start in range(0, full, length)]
        rest = rest[full:]
        if enough is not None and len(windows) >= enough:
            break
    return windows


def _choose(windows: list[list[int]], count: int, seed: int) -> list[list[int]]:
    """`count` windows at random, in their order. Documents are packed whole: a long one gives more than its start."""
    chosen = Random(seed).sample(range(len(windows)), min(count, len(windows)))
    return [windows[index] for index in sorted(chosen)]
