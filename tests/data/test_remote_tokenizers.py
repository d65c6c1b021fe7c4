"""A tokenizer that brings its own code is run only for who trusts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qcompiler.data import load_evaluation
from qcompiler.errors import DataError
from tests.data.conftest import save_tokenizer

CODE = """
from transformers import PreTrainedTokenizerFast


class LoudTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, **options):
        return super().__call__(text + " loud", **options)
"""


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_tokenizer(folder, None)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config |= {"tokenizer_class": "LoudTokenizer", "auto_map": {"AutoTokenizer": [None, "loud.LoudTokenizer"]}}
    file.write_text(json.dumps(config))
    (folder / "loud.py").write_text(CODE)
    return folder


def test_it_is_refused_unasked(remote: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        load_evaluation(None, remote, rows=["a b c"], sequence_length=2, vocab_size=1000)


def test_and_run_where_it_is_trusted(remote: Path) -> None:
    data = load_evaluation(None, remote, rows=["a b c"], sequence_length=2, vocab_size=1000, trust_remote_code=True)
    assert data.tokens > 6  # what the text alone has
