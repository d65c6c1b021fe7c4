"""The demo model that ships: small, whole, trained, and sensitive to quantization."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qcompiler.data import TokenData, load_evaluation
from qcompiler.demo import calibration_text, evaluation_text, model_path


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(model_path(), output_loading_info=True)
    assert not any(info.values()), info
    return model.float().eval()


@pytest.fixture(scope="module")
def held_out(model: PreTrainedModel) -> TokenData:
    return load_evaluation(
        evaluation_text(),
        model_path(),
        sequence_length=model.config.max_position_embeddings,
        vocab_size=model.config.vocab_size,
        sequences=16,
    )


@torch.inference_mode()
def perplexity(model: PreTrainedModel, data: TokenData) -> float:
    losses = [model(input_ids=batch.input_ids, labels=batch.input_ids).loss for batch in data.batches]
    return math.exp(torch.stack(losses).mean())


def round_to_nearest(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """Every linear of the decoder layers at `bits`, symmetric, one scale per output row."""
    model = copy.deepcopy(model)
    top = 2 ** (bits - 1) - 1
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.data.abs().amax(1, keepdim=True) / top
            module.weight.data = (module.weight.data / scale).round() * scale
    return model


def test_checkpoint_is_complete_and_at_most_8_megabytes() -> None:
    files = {file.name: file.stat().st_size for file in model_path().iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 8_000_000


def test_every_scheme_applies_to_its_shapes(model: PreTrainedModel) -> None:
    assert model.config.dtype == torch.bfloat16
    assert model.config.head_dim == 64
    assert not model.config.tie_word_embeddings
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers + 1
    assert all(size % 128 == 0 for linear in linears for size in linear.weight.shape)


def test_perplexity_of_unseen_text_is_low_and_3_bits_raise_it_most(model: PreTrainedModel, held_out: TokenData) -> None:
    dense = perplexity(model, held_out)
    int8, int4, int3 = (perplexity(round_to_nearest(model, bits), held_out) for bits in (8, 4, 3))
    assert dense < 60
    assert int8 == pytest.approx(dense, rel=0.01)
    assert int4 > 1.005 * dense
    assert int3 > 1.02 * int4


def test_evaluation_text_shares_no_paragraph_with_calibration_text() -> None:
    shipped = [set(path.read_text("utf-8").split("\n\n")) for path in (calibration_text(), evaluation_text())]
    assert all(sum(map(len, paragraphs)) > 100_000 for paragraphs in shipped)
    assert not [paragraph for paragraph in shipped[0] & shipped[1] if len(paragraph) > 60]
    assert calibration_text().stat().st_size <= 200_000


def test_it_generates_words_of_the_books(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    prompt = tokenizer("The king said to his daughter", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=60, do_sample=False, repetition_penalty=1.2)
    text = tokenizer.decode(generated[0], skip_special_tokens=True)
    assert text.startswith("The king said to his daughter")
    words = re.findall(r"[a-z]+", text.lower())
    known = set(
        re.findall(r"[a-z]+", (calibration_text().read_text("utf-8") + evaluation_text().read_text("utf-8")).lower())
    )
    assert len(words) > 30
    assert sum(word in known for word in words) > 0.9 * len(words)


def test_tokenizer_round_trips_any_text_and_writes_chats_as_plays() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    text = "\u201cLady Anne\u201d — naïve 東京\n\ttabs  and spaces "
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id
    chat = [{"role": "user", "content": "Who art thou?"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s>User:\nWho art thou?\n\nAssistant:\n"
