"""Verify a compiled checkpoint as a client sees it: Transformers loads it, and computes what was compiled."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qcompiler.arguments import check_count, check_type
from qcompiler.checkpoints.manifest import check_files
from qcompiler.checkpoints.output import PROVENANCE
from qcompiler.data import TokenBatch, load_evaluation
from qcompiler.errors import CheckpointError, DataError, VerificationError
from qcompiler.fidelity import Fidelity, measure, run_model
from qcompiler.lowering.evaluate import logits, open_lowered
from qcompiler.provenance import Provenance, read_provenance
from qcompiler.scheme import KVCacheSpec, Scheme
from qcompiler.source import DTYPES, ModelSource, open_model
from qcompiler.table_check import WeightComparison, check_table, compare_weights

_PROBE = (2, 64)
"""Sequences and tokens of the random input on which logits are compared: every layer takes part, whatever they say."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked. `difference` is that of the logits: its root mean square over their standard deviation.

    files: how many are byte for byte those that were written; None where nothing says what was written. weights: the
    comparison with the reference, None without one, or where there is no table to compare with; `notes` say so.
    """

    checkpoint: Path
    files: int | None
    difference: float
    tolerance: float
    tolerance_because: str
    weights: WeightComparison | None
    fidelity: Fidelity | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        exact = "equal to the last bit" if self.difference == 0 else f"differ by {self.difference:.3g} of their spread"
        lines = [f"{self.checkpoint}: Transformers loads it, nothing missing, unexpected or mismatched"]
        if self.files is not None:
            lines.append(f"files: {self.files} are byte for byte those that were written (SHA-256)")
        lines.append(
            f"logits against the compiled graph: {exact} (tolerance {self.tolerance:.3g}: {self.tolerance_because})"
        )
        if self.weights:
            lines.append(f"weights against the reference: {self.weights}")
        measured = [str(self.fidelity)] if self.fidelity else []
        return "\n".join([*lines, *measured, *(f"note: {note}" for note in self.notes)])


def verify(
    checkpoint: str | Path,
    *,
    reference: str | Path | None = None,
    text: str | Path | None = None,
    config_name: str | None = None,
    split: str | None = None,
    text_column: str | None = None,
    sequence_length: int = 512,
    sequences: int | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Check that a checkpoint is what was compiled, and that Transformers computes with it what the graph computes.

    Its files must be those that were written, its layers those of the table in qcompiler.json, and its logits in
    Transformers those of its lowered graph. reference: the dense model, a folder or hub id: weight errors must be
    those of the table, dense tensors must be equal. text: a file or dataset on which perplexity is measured, and with
    a reference KL divergence and top-1 agreement, in windows of `sequence_length` tokens (the first `sequences` of
    them, or all); config_name, split (default: test) and text_column say what to read of it.

    Raises `VerificationError` where the checkpoint is not what was compiled, where loading leaves anything out or
    logits differ beyond the scheme's tolerance; `CheckpointError` where there is no checkpoint, or one that is damaged
    in itself; `DataError` for a text that cannot be used or a reference that is another model; `ConfigError` for
    arguments that cannot be meant.
    """
    check_type("checkpoint", checkpoint, (str, Path), "the path of a compiled folder")
    for name, value in (("reference", reference), ("text", text)):
        check_type(name, value, (str, Path, NoneType), "a path or hub id, or None")
    for name, value in (("config_name", config_name), ("split", split), ("text_column", text_column)):
        check_type(name, value, (str, NoneType), "text, or None")
    check_count("sequence_length", sequence_length, least=2)
    if sequences is not None:
        check_count("sequences", sequences, least=1)
    check_type("trust_remote_code", trust_remote_code, bool, "True or False")
    folder = Path(checkpoint)
    provenance = read_provenance(folder)
    files, notes = _check_files(folder, provenance)
    with ExitStack() as stack:
        lowered = stack.enter_context(open_lowered(folder, trust_remote_code=trust_remote_code))
        source, dense, weights = lowered.source, None, None
        if reference is not None:
            dense = stack.enter_context(_open_reference(reference, source, trust_remote_code))
        data = None
        if text is not None:
            data = load_evaluation(
                text,
                source.folder,
                config_name=config_name,
                split=split,
                text_column=text_column,
                sequence_length=sequence_length,
                vocab_size=int(source.config.vocab_size),
                max_window=source.window,
                sequences=sequences,
                batch_tokens=4 * sequence_length,
                trust_remote_code=trust_remote_code,
            )
            notes += data.notes
        client = _load_checkpoint(folder, provenance, trust_remote_code)
        if provenance is not None:
            check_table(lowered, provenance)
        if dense is not None and provenance is not None:
            weights = compare_weights(lowered, dense, provenance)
        elif dense is not None:
            notes += ("weights were not compared with the reference: there is no table of their errors",)
        (ours,) = logits(lowered, [probe := _probe(source)], torch.device("cpu"))
        difference = _difference(_first_run(client, probe, folder), ours)
        config = lowered.reader.config
        tolerance, because = tolerance_of(lowered.reader.schemes.values(), config.kv_cache, source.dtype)
        if not difference <= tolerance:
            raise VerificationError(
                f"{folder}: Transformers' logits differ from the compiled graph's by {difference:.3g} of their spread, "
                f"more than {tolerance:.3g} ({because})",
                hint="the checkpoint and the compiler disagree about what was compiled: do not deploy it",
            )
        fidelity = None
        if data is not None:
            loaded = _load_dense(dense, trust_remote_code) if dense is not None else None
            fidelity = measure(client, loaded, data.batches)
    return Verification(folder, files, difference, tolerance, because, weights, fidelity, notes)


def _check_files(folder: Path, provenance: Provenance | None) -> tuple[int | None, tuple[str, ...]]:
    """How many files are as they were written, and what to say of the others. Raises `VerificationError`."""
    unseen = "changed bytes cannot be seen"
    if provenance is None:
        return None, (f"there is no {PROVENANCE} that says what was written: {unseen}",)
    digests = provenance.digests
    if digests is None:
        return None, (f"{PROVENANCE} is of an earlier version and has no digests of files: {unseen}; compile again",)
    changed = check_files(folder, digests)
    notes = (f"changed since it was written: {', '.join(changed)}",) if changed else ()
    return len(digests) - len(changed), notes


def _load_checkpoint(folder: Path, provenance: Provenance | None, trust_remote_code: bool) -> PreTrainedModel:
    try:
        return load_client(folder, trust_remote_code=trust_remote_code)
    except VerificationError as error:
        if provenance is None or provenance.obstacle is None:
            raise
        raise VerificationError(
            f"{error.message} ({provenance.obstacle})",
            hint=f"this was known when it was compiled: judge it in the runtime of {provenance.report.target}",
        ) from error


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


def tolerance_of(schemes: Iterable[Scheme], kv_cache: KVCacheSpec | None, dtype: torch.dtype) -> tuple[float, str]:
    """How far logits may differ (root mean square, relative to their standard deviation), and why.

    Weights dequantize element by element, so both sides multiply by the same numbers with the same kernels. Where
    activations or the key/value cache are rounded, the graph does so in compressed-tensors' own order of operations and
    is equal too; but that order is no promise of the library: a quotient that is computed otherwise differs in its last
    place, and so may what is rounded next.
    """
    rounded = ["activations"] if any(scheme.input_activations for scheme in schemes) else []
    rounded += ["the key/value cache"] if kv_cache is not None else []
    if not rounded:
        return 0.0, "weights dequantize to the same numbers, and the same kernels multiply them"
    name = str(dtype).removeprefix("torch.")
    return torch.finfo(dtype).eps, f"one last place of {name}, in which scales of {' and '.join(rounded)} are applied"


def _open_reference(reference: str | Path, ours: ModelSource, trust_remote_code: bool) -> ModelSource:
    """The dense model, in the checkpoint's dtype. Raises a `QCompilerError` where it is damaged, or another model."""
    dtype = str(ours.dtype).removeprefix("torch.")
    source = open_model(reference, trust_remote_code=trust_remote_code, dtype=dtype if dtype in DTYPES else "auto")
    try:
        theirs, expected = source.config.vocab_size, ours.config.vocab_size
        if theirs != expected:
            raise DataError(
                f"reference {reference} has a vocabulary of {theirs} tokens, and the checkpoint one of {expected}",
                hint="give the model that the checkpoint was compiled from",
            )
        source.check_weights()
    except BaseException:
        source.close()
        raise
    return source


def _load_dense(source: ModelSource, trust_remote_code: bool) -> PreTrainedModel:
    """The reference in Transformers, as its files have it."""
    try:
        with _no_bars():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype="auto", trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise CheckpointError(
            f"reference {source.folder}: Transformers does not load it: {type(error).__name__}: {error}",
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
