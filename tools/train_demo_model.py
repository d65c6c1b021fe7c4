"""Train the small Llama that ships in `qcompiler.demo`, from public-domain books, on one CPU core.

    python tools/train_demo_model.py --texts DIR --output qcompiler/demo

writes `model/` (a checkpoint and its tokenizer), `calibration.txt` (part of the training text) and `evaluation.txt`
(text that neither the tokenizer nor the model has seen). One seed gives one model on one machine and one torch.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qcompiler.data import TokenData, load_evaluation

VOCABULARY = 2048
WINDOW = 256  # tokens the model sees at once
BATCH = 8
PEAK_LR = 2e-3
WARMUP = 100
WEIGHT_DECAY = 0.1

# The books are full of plays, so a chat is written the way a play is: the role, a colon, the line.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


def passage(paragraphs: list[str], start: float, length: float) -> slice:
    """The paragraphs that hold the characters from fraction `start` on, `length` of the whole."""
    ends = torch.tensor([len(p) for p in paragraphs]).cumsum(0)
    first, last = (int(torch.searchsorted(ends, int(f * ends[-1]))) for f in (start, start + length))
    return slice(first, last)


def split_books(folder: Path) -> tuple[list[str], str, str]:
    """`(training sections, calibration text, evaluation text)` of the `.txt` books in `folder`.

    Of each book one contiguous 5% is held out; another 8%, which stays in training, is the calibration text.
    """
    books = sorted(folder.glob("*.txt"))
    if not books:
        raise SystemExit(f"no .txt file in {folder}")
    training: list[str] = []
    calibration: list[str] = []
    evaluation: list[str] = []
    for book in books:
        paragraphs = [p.strip("\n") for p in book.read_text("utf-8").split("\n\n") if p.strip()]
        held_out = passage(paragraphs, 0.60, 0.05)
        evaluation += paragraphs[held_out]
        calibration += paragraphs[passage(paragraphs, 0.20, 0.08)]
        training += [*sections(paragraphs[: held_out.start]), *sections(paragraphs[held_out.stop :])]
    return training, "\n\n".join(calibration) + "\n", "\n\n".join(evaluation) + "\n"


def sections(paragraphs: list[str], characters: int = 4000) -> Iterator[str]:
    """Consecutive paragraphs joined to documents, so that training meets begin- and end-of-text often enough."""
    part: list[str] = []
    for paragraph in paragraphs:
        part.append(paragraph)
        if sum(map(len, part)) >= characters:
            yield "\n\n".join(part)
            part = []
    if part:
        yield "\n\n".join(part)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, and decoding gives it back."""
    special = ["<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama whose every linear dimension divides by 128, with heads of 64: each scheme and runtime takes it."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean cross-entropy (nats per token) of `tokens` [B, S], each predicted from those before it."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, held_out: TokenData) -> float:
    """Mean loss over the windows of `held_out`."""
    model.eval()
    losses = [loss_of(model, batch.input_ids) * len(batch.input_ids) for batch in held_out.batches]
    model.train()
    return float(torch.stack(losses).sum()) / held_out.sequences


def train(model: LlamaForCausalLM, stream: Tensor, held_out: TokenData, steps: int, seed: int) -> None:
    """AdamW with warm-up and cosine decay, on windows taken at random from `stream` [tokens]."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    generator = torch.Generator().manual_seed(seed)
    reach = torch.arange(WINDOW)
    running, start = 0.0, time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        offsets = torch.randint(len(stream) - WINDOW, (BATCH, 1), generator=generator)
        loss = loss_of(model, stream[offsets + reach])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        running += loss.item() / 100
        if step % 100 == 0:
            rate = step * BATCH * WINDOW / (time.perf_counter() - start)
            print(
                f"step {step:5d}/{steps}  train {running:.3f}  "
                + (f"eval {evaluate(model, held_out):.3f}  " if step % 500 == 0 else "")
                + f"{rate:.0f} tokens/s",
                flush=True,
            )
            running = 0.0


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    shared = Path(os.environ.get("QCOMPILER_SHARED", root.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, default=shared / "data" / "public-domain", help="folder of .txt books")
    parser.add_argument("--output", type=Path, default=root / "qcompiler" / "demo")
    parser.add_argument("--steps", type=int, default=3000, help="of 2048 tokens each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    training, calibration, evaluation = split_books(args.texts)
    folder = args.output / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (args.output / "calibration.txt").write_text(calibration, "utf-8")
    (args.output / "evaluation.txt").write_text(evaluation, "utf-8")

    tokenizer = train_tokenizer(training)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    stream = torch.tensor([t for ids in tokenizer(training)["input_ids"] for t in (*ids, tokenizer.eos_token_id)])
    held_out = load_evaluation(
        args.output / "evaluation.txt",
        folder,
        sequence_length=WINDOW,
        vocab_size=VOCABULARY,
        batch_tokens=BATCH * WINDOW,
    )
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(stream):,} training tokens, {held_out.tokens:,} held out")

    train(model, stream, held_out, args.steps, args.seed)

    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    loss = evaluate(model, held_out)
    frequency = torch.bincount(stream, minlength=VOCABULARY).clamp(min=1) / len(stream)
    unigram = -torch.cat([frequency[batch.input_ids].log() for batch in held_out.batches]).mean()
    print(f"evaluation loss {loss:.3f}, perplexity {math.exp(loss):.2f} (by token frequency alone {unigram.exp():.0f})")


if __name__ == "__main__":
    main()
