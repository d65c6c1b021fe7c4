"""Verify a compiled checkpoint as a client sees it: Transformers loads it, and computes what was compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qcompiler.data import TokenBatch, load_evaluation
from qcompiler.errors import DataError, VerificationError
from qcompiler.runtime.lowered import logits, open_lowered
from qcompiler.scheme import Scheme
from qcompiler.source import ModelSource


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A quantized model against the dense one, over every predicted token of a text.

    KL divergences are in nats, of the dense distribution from the quantized one. `top1` is the share of tokens whose
    most likely successor is the same.
    """

    tokens: int
    kl_mean: float
    kl_median: float
    kl_99: float
    kl_max: float
    top1: float
    perplexity: float
    reference_perplexity: float

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f} against {self.reference_perplexity:.4f} dense "
            f"({100 * (self.perplexity / self.reference_perplexity - 1):+.2f}%)\n"
            f"KL divergence: mean {self.kl_mean:.5f}, median {self.kl_median:.5f}, 99% {self.kl_99:.5f}, "
            f"max {self.kl_max:.5f} nats over {self.tokens} tokens\n"
            f"top-1 agreement {100 * self.top1:.2f}%"
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked. `difference` is the largest difference of logits relative to their standard deviation."""

    checkpoint: Path
    difference: float
    tolerance: float
    tolerance_because: str
    fidelity: Fidelity | None

    def __str__(self) -> str:
        lines = [
            f"{self.checkpoint}: Transformers loads it, nothing missing, unexpected or mismatched",
            f"logits against the compiled graph: differ by {self.difference:.3g} standard deviations "
            f"(tolerance {self.tolerance:g}: {self.tolerance_because})",
        ]
        return "\n".join([*lines, *([str(self.fidelity)] if self.fidelity else [])])


def verify(
    checkpoint: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    sequence_length: int = 512,
    sequences: int | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Load a checkpoint with Transformers, compare its logits with those of its lowered graph, and with a dense model.

    reference: the dense model, for KL divergence, top-1 agreement and perplexity on `text` (required with it).
    Raises `VerificationError` where loading leaves anything out or logits differ beyond the scheme's tolerance.
    """
    folder = Path(checkpoint)
    if reference is not None and text is None:
        raise DataError("a comparison with a reference needs a text", hint="pass --text FILE (Python: text=)")
    graph, source = open_lowered(folder, trust_remote_code=trust_remote_code)
    try:
        client = load_client(folder, trust_remote_code=trust_remote_code)
        schemes = set(_schemes(source))
        batches = _probe(source)
        ours = logits(graph, source, batches, torch.device("cpu"))
        tolerance, because = tolerance_of(schemes, source.dtype)
        difference = max(_difference(_run(client, b), mine) for b, mine in zip(batches, ours, strict=True))
        if not difference <= tolerance:
            raise VerificationError(
                f"{folder}: Transformers' logits differ from the compiled graph's by {difference:.3g} standard deviations, more "
                f"than {tolerance:g} ({because})",
                hint="the checkpoint and the compiler disagree about what was compiled: do not deploy it",
            )
        fidelity = None
        if text is not None:
            fidelity = _fidelity(client, reference, text, source, sequence_length, sequences, trust_remote_code)
        return Verification(folder, difference, tolerance, because, fidelity)
    finally:
        source.close()


def load_client(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The checkpoint in Transformers. Raises `VerificationError` where a tensor is missing, unexpected or mismatched."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code
    )
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if problems:
        raise VerificationError(
            f"{folder}: Transformers reports {'; '.join(f'{k}: {v[:3]}' for k, v in problems.items())}",
            hint="it would run with random or wrong weights: do not deploy it",
        )
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


def tolerance_of(schemes: set[Scheme], dtype: torch.dtype) -> tuple[float, str]:
    """How far logits may differ, in their standard deviations, and why."""
    if not any(scheme.input_activations for scheme in schemes):
        return 0.0, "weight-only schemes dequantize to the same weights, so everything after is the same"
    step = torch.finfo(dtype).eps
    return 64 * step, (
        f"activations are rounded in {str(dtype).removeprefix('torch.')}, where one different rounding moves on"
    )


def _schemes(source: ModelSource) -> Sequence[Scheme]:
    from qcompiler.checkpoints.decompress import CompressedReader

    reader = source.reader
    assert isinstance(reader, CompressedReader)
    return list(reader.schemes.values())


def _probe(source: ModelSource) -> list[TokenBatch]:
    """A few random sequences: every layer takes part, whatever they say."""
    generator = torch.Generator().manual_seed(0)
    length = min(64, source.window or 64)
    ids = torch.randint(0, int(source.config.vocab_size), (2, length), generator=generator)
    return [TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))]


def _run(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits
    return result.cpu()


def _difference(theirs: Tensor, ours: Tensor) -> float:
    a, b = theirs.double(), ours.double()
    return float((a - b).abs().max() / b.std().clamp_min(1e-30))


def _fidelity(
    client: PreTrainedModel,
    reference: str | Path | None,
    text: str | Path,
    source: ModelSource,
    sequence_length: int,
    sequences: int | None,
    trust_remote_code: bool,
) -> Fidelity:
    data = load_evaluation(
        text,
        source.folder,
        sequence_length=sequence_length,
        vocab_size=int(source.config.vocab_size),
        max_window=source.window,
        sequences=sequences,
        batch_tokens=4 * sequence_length,
    )
    dense: PreTrainedModel = client
    if reference is not None:
        dense = AutoModelForCausalLM.from_pretrained(
            reference, dtype="auto", trust_remote_code=trust_remote_code
        ).eval()
    divergences, agree, losses, dense_losses = [], [], [], []
    for batch in data.batches:
        wanted = torch.log_softmax(_run(dense, batch).float(), -1)[:, :-1]
        got = torch.log_softmax(_run(client, batch).float(), -1)[:, :-1] if dense is not client else wanted
        labels = batch.input_ids[:, 1:, None]
        divergences.append((wanted.exp() * (wanted - got)).sum(-1).flatten())
        agree.append((wanted.argmax(-1) == got.argmax(-1)).flatten())
        losses.append(-got.gather(-1, labels).flatten())
        dense_losses.append(-wanted.gather(-1, labels).flatten())
    kl = torch.cat(divergences).clamp_min(0)
    return Fidelity(
        tokens=kl.numel(),
        kl_mean=float(kl.mean()),
        kl_median=float(kl.median()),
        kl_99=float(torch.quantile(kl, 0.99))
        if kl.numel() < 1 << 24
        else float(kl.kthvalue(int(kl.numel() * 0.99))[0]),
        kl_max=float(kl.max()),
        top1=float(torch.cat(agree).float().mean()),
        perplexity=float(torch.cat(losses).double().mean().exp()),
        reference_perplexity=float(torch.cat(dense_losses).double().mean().exp()),
    )
