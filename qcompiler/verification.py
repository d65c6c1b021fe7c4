"""Verify a compiled checkpoint as a client sees it: Transformers loads it, and computes what was compiled."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qcompiler.data import TokenBatch, load_evaluation
from qcompiler.errors import CheckpointError, DataError, VerificationError
from qcompiler.fidelity import Fidelity, measure, run_model
from qcompiler.lowering.evaluate import logits, open_lowered
from qcompiler.scheme import Scheme
from qcompiler.source import ModelSource, open_model

_PROBE = (2, 64)
"""Sequences and tokens of the random input on which logits are compared: every layer takes part, whatever they say."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked. `difference` is that of the logits: its root mean square over their standard deviation."""

    checkpoint: Path
    difference: float
    tolerance: float
    tolerance_because: str
    fidelity: Fidelity | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        exact = "equal to the last bit" if self.difference == 0 else f"differ by {self.difference:.3g} of their spread"
        lines = [
            f"{self.checkpoint}: Transformers loads it, nothing missing, unexpected or mismatched",
            f"logits against the compiled graph: {exact} (tolerance {self.tolerance:.3g}: {self.tolerance_because})",
        ]
        measured = [str(self.fidelity)] if self.fidelity else []
        return "\n".join([*lines, *measured, *(f"note: {note}" for note in self.notes)])


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

    text: a file or dataset on which perplexity is measured, in windows of `sequence_length` tokens (the first
    `sequences` of them, or all). reference: the dense model, a folder or hub id, for KL divergence and top-1 agreement
    on that text. Raises `VerificationError` where loading leaves anything out or logits differ beyond the scheme's
    tolerance, `CheckpointError` where there is no checkpoint, and `DataError` for a text that cannot be used.
    """
    folder = Path(checkpoint)
    if reference is not None and text is None:
        raise DataError("a comparison with a reference needs a text", hint="pass --text FILE (Python: text=)")
    with open_lowered(folder, trust_remote_code=trust_remote_code) as lowered:
        source = lowered.source
        data = None
        if text is not None:
            data = load_evaluation(
                text,
                source.folder,
                sequence_length=sequence_length,
                vocab_size=int(source.config.vocab_size),
                max_window=source.window,
                sequences=sequences,
                batch_tokens=4 * sequence_length,
                trust_remote_code=trust_remote_code,
            )
        client = load_client(folder, trust_remote_code=trust_remote_code)
        probe = _probe(source)
        (ours,) = logits(lowered, [probe], torch.device("cpu"))
        difference = _difference(_first_run(client, probe, folder), ours)
        tolerance, because = tolerance_of(lowered.reader.schemes.values(), source.dtype)
    if not difference <= tolerance:
        raise VerificationError(
            f"{folder}: Transformers' logits differ from the compiled graph's by {difference:.3g} of their spread, "
            f"more than {tolerance:.3g} ({because})",
            hint="the checkpoint and the compiler disagree about what was compiled: do not deploy it",
        )
    fidelity = None
    if data is not None:
        dense = _load_dense(reference, client, trust_remote_code) if reference is not None else None
        fidelity = measure(client, dense, data.batches)
    return Verification(folder, difference, tolerance, because, fidelity, data.notes if data is not None else ())


def load_client(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The checkpoint in Transformers. Raises `VerificationError` where a tensor is missing, unexpected or of another
    shape, or where Transformers raises.
    """
    try:
        with _no_bars():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # loading fails in as many ways as there are models
        raise VerificationError(
            f"{folder}: Transformers does not load it: {type(error).__name__}: {error}", hint="do not deploy it"
        ) from error
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if problems:
        raise VerificationError(
            f"{folder}: Transformers reports {'; '.join(f'{k}: {v[:3]}' for k, v in problems.items())}",
            hint="it would run with random or wrong weights: do not deploy it",
        )
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


def _first_run(client: PreTrainedModel, probe: TokenBatch, folder: Path) -> Tensor:
    """The client's logits; its first forward pass decompresses the weights."""
    try:
        with _no_bars():
            return run_model(client, probe)
    except Exception as error:
        raise VerificationError(
            f"{folder}: Transformers loads it, and cannot run it: {type(error).__name__}: {error}",
            hint="if it runs the dense model in this dtype, do not deploy the checkpoint",
        ) from error


def _no_bars() -> redirect_stderr[io.StringIO]:
    """compressed-tensors' progress bars cannot be turned off."""
    return redirect_stderr(io.StringIO())


def tolerance_of(schemes: Iterable[Scheme], dtype: torch.dtype) -> tuple[float, str]:
    """How far logits may differ (root mean square, relative to their standard deviation), and why.

    Weights dequantize element by element, so both sides multiply by the same numbers with the same kernels. Where
    activations are rounded, the graph does so in compressed-tensors' own order of operations and is equal too; but that
    order is no promise of the library: a scale that is computed otherwise differs in its last place.
    """
    if not any(scheme.input_activations for scheme in schemes):
        return 0.0, "weights dequantize to the same numbers, and the same kernels multiply them"
    name = str(dtype).removeprefix("torch.")
    return torch.finfo(dtype).eps, f"one last place of {name}, in which the scales of activations are computed"


def _load_dense(reference: str | Path, client: PreTrainedModel, trust_remote_code: bool) -> PreTrainedModel:
    """The reference in Transformers. Raises a `QCompilerError` where it is damaged, or no reference for `client`."""
    with open_model(reference, trust_remote_code=trust_remote_code) as source:
        theirs, ours = source.config.vocab_size, client.config.vocab_size
        if theirs != ours:
            raise DataError(
                f"reference {reference} has a vocabulary of {theirs} tokens, and the checkpoint one of {ours}",
                hint="give the model that the checkpoint was compiled from",
            )
        source.check_weights()
        try:
            with _no_bars():
                model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                    source.folder, dtype="auto", trust_remote_code=trust_remote_code
                )
        except Exception as error:
            raise CheckpointError(
                f"reference {reference}: Transformers does not load it: {type(error).__name__}: {error}",
                hint="give the model that the checkpoint was compiled from",
            ) from error
    return model.eval()


def _probe(source: ModelSource) -> TokenBatch:
    rows, length = _PROBE
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        0, int(source.config.vocab_size), (rows, min(length, source.window or length)), generator=generator
    )
    return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))


def _difference(theirs: Tensor, ours: Tensor) -> float:
    """Infinite where either is not a number."""
    a, b = theirs.double(), ours.double()
    if not bool(a.isfinite().all() & b.isfinite().all()):
        return float("inf")
    return float((a - b).square().mean().sqrt() / b.std().clamp_min(torch.finfo(torch.float64).tiny))
