"""From a row (text, a chat, or token ids) to token ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qcompiler.errors import DataError, did_you_mean

USUAL_COLUMNS = ("input_ids", "messages", "text")


class LazyTokenizer:
    """A tokenizer that is loaded when text first needs it: token ids need none."""

    def __init__(self, source: str | Path | None, *, trust_remote_code: bool = False) -> None:
        self._source = source
        self._trusted = trust_remote_code
        self._tokenizer: Any = None

    def _load(self) -> Any:
        if self._tokenizer is None:
            if self._source is None:
                raise DataError("text needs a tokenizer, and there is none", hint="give rows of `input_ids`")
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(str(self._source), trust_remote_code=self._trusted)
            except Exception as error:  # whatever a damaged or missing file makes of it
                raise DataError(
                    f"no tokenizer can be loaded from {self._source}: {next(iter(str(error).splitlines()), error)}",
                    hint="put tokenizer files there (of a loaded model: tokenizer=), or give rows of `input_ids`",
                ) from error
        return self._tokenizer

    def text(self, text: str) -> list[int]:
        return list(self._load()(text, verbose=False)["input_ids"])

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        tokenizer = self._load()
        if tokenizer.chat_template is None:
            raise DataError(
                f"rows are chats, but the tokenizer of {self._source} has no chat template",
                hint="name a column of plain text: --text-column (Python: text_column); or put a chat template there",
            )
        # Tables fill the keys a message lacks with nulls; templates ask whether a key is there.
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        text = tokenizer.apply_chat_template(given, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def end_of_text(self) -> list[int]:
        """What separates packed documents: the end-of-text token, if there is one. Token ids bring their own."""
        token = None if self._tokenizer is None else self._tokenizer.eos_token_id
        return [] if token is None else [int(token)]


@dataclass(frozen=True, slots=True)
class RowEncoder:
    """Encodes rows of `name`; `column` is where mappings hold what to read.

    A string is text, a list of mappings is a chat, a list (or 1-D tensor) of integers is token ids.
    """

    name: str
    column: str | None
    tokenizer: LazyTokenizer
    vocab_size: int

    @classmethod
    def for_rows_like(
        cls, row: Any, *, name: str, column: str | None, tokenizer: LazyTokenizer, vocab_size: int
    ) -> RowEncoder:
        """An encoder for rows like `row`. Raises `DataError` if it has no `column`, or no column stands out."""
        if isinstance(row, Mapping):
            column = _find_column(row, name, column)
        elif column is not None:
            raise DataError(
                f"rows of {name} have no columns, but {column!r} was asked for", hint="leave the column out"
            )
        return cls(name, column, tokenizer, vocab_size)

    def __call__(self, number: int, row: Any) -> list[int]:
        """Token ids of row `number`; none for an empty one. Raises `DataError` if it cannot be encoded."""
        value = self.value(number, row)
        try:
            ids = self._encode(value)
            if self.column == "input_ids" and row.get("attention_mask") is not None:
                ids = [token for token, real in zip(ids, _as_list(row["attention_mask"]), strict=True) if real]
        except DataError:
            raise
        except Exception as error:  # chat templates and tokenizers raise what they like
            raise DataError(
                f"row {number} of {self.name} cannot be encoded: {type(error).__name__}: {error}",
                hint="a row is a text, a chat, or a list of token ids; text_column chooses the column",
            ) from error
        bad = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if bad is not None:
            raise DataError(
                f"row {number} of {self.name} has token id {bad}, but the model's vocabulary has {self.vocab_size}",
                hint="use the tokenizer that belongs to this model",
            )
        return ids

    def value(self, number: int, row: Any) -> Any:
        """What row `number` holds: the value of its column, or the row itself."""
        if self.column is None:
            return row
        if not isinstance(row, Mapping) or self.column not in row:
            raise DataError(
                f"row {number} of {self.name} has no column {self.column!r}",
                hint="rows need one form; the first one read has this column",
            )
        return row[self.column]

    def _encode(self, value: Any) -> list[int]:
        if value is None:
            return []
        if isinstance(value, str):
            return self.tokenizer.text(value) if value.strip() else []
        items = _as_list(value)
        if items and all(isinstance(item, Mapping) for item in items):
            return self.tokenizer.chat(items)
        return [operator.index(item) for item in items]


def _find_column(row: Mapping[str, Any], name: str, column: str | None) -> str:
    columns = ", ".join(map(str, row))
    if column is not None:
        if column not in row:
            raise DataError(f"{name} has no column {column!r}{did_you_mean(column, row)}", hint=f"columns: {columns}")
        return column
    strings = [key for key, value in row.items() if isinstance(value, str)]
    usual = [key for key in USUAL_COLUMNS if key in row]
    if not usual and len(strings) != 1:
        raise DataError(
            f"which column of {name} to read is not clear",
            hint=f"name it: --text-column (Python: text_column); columns: {columns}",
        )
    return usual[0] if usual else strings[0]


def _as_list(value: Any) -> list[Any]:
    """A list from a list, a tuple, a 1-D tensor or array."""
    return list(value.tolist() if hasattr(value, "tolist") else value)
