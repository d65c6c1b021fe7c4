"""The script that trains the demo model, on made-up books."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train_demo_model.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_model", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("books")
    rng = random.Random(0)
    for book in ("first", "second"):
        paragraphs = (f"{book} {i}: " + " ".join(rng.choices("abcdefghij", k=60)) for i in range(200))
        (folder / f"{book}.txt").write_text("\n\n".join(paragraphs))
    return folder


def test_held_out_text_is_one_passage_per_book_and_in_no_training_text(tool: ModuleType, books: Path) -> None:
    training, calibration, evaluation = tool.split_books(books)
    whole = {paragraph for book in books.iterdir() for paragraph in book.read_text().split("\n\n")}
    trained = {paragraph for section in training for paragraph in section.split("\n\n")}
    held_out = evaluation.strip().split("\n\n")
    assert trained | set(held_out) == whole
    assert not trained & set(held_out)
    assert set(calibration.strip().split("\n\n")) < trained
    assert 0.04 < len(held_out) / len(whole) < 0.06
    for book in ("first", "second"):
        numbers = [int(p.split(":")[0].split()[1]) for p in held_out if p.startswith(book)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_one_seed_gives_one_checkpoint_that_loads(
    tool: ModuleType, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        output = str(tmp_path / name)
        arguments = ["--texts", str(books), "--output", output, "--steps", "1", "--seed", seed]
        monkeypatch.setattr("sys.argv", [str(TOOL), *arguments])
        tool.main()
    assert "evaluation loss" in capsys.readouterr().out
    a, b, c = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "abc")
    assert all(a[key].equal(b[key]) for key in a)
    assert not all(a[key].equal(c[key]) for key in a)
    AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
