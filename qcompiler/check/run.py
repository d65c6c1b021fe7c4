"""Check a compressed-tensors checkpoint, whoever wrote it, before it is deployed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType

from qcompiler.arguments import check_type
from qcompiler.check.checkpoint import Checkpoint
from qcompiler.check.config import Config, read_config_groups
from qcompiler.check.embeddings import Embeddings
from qcompiler.check.entries import overlaps, repeated, unmatched, within_budget
from qcompiler.check.files import of_folder
from qcompiler.check.findings import MODEL, CheckReport, Finding, in_order
from qcompiler.check.legal import illegal, unloadable
from qcompiler.check.linears import Linear, Linears, find_linears
from qcompiler.check.loaders import Comparison, Meaning, Verdicts, resolve
from qcompiler.check.tensors import Stored
from qcompiler.check.values import Values
from qcompiler.checkpoints.hub import resolve_model
from qcompiler.errors import CheckpointError, ConfigError
from qcompiler.targets import load_target


def check_checkpoint(
    checkpoint: str | Path,
    *,
    target: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> CheckReport:
    """Find what loaders will not load, or load wrong, in a compressed-tensors checkpoint: a folder or a hub id.

    Weights are not read: headers are, and the values of scales and zero points, a few MiB at a time. target: judge it
    for one runtime on one kind of hardware; errors that concern other loaders alone become warnings. revision: branch,
    tag or commit of a hub model.

    Raises `CheckpointError` where there is no such checkpoint, or its files are damaged or hostile, and `ConfigError`
    for an unknown target.
    """
    check_type("checkpoint", checkpoint, (str, Path), "a folder or a hub id")
    check_type("target", target, (str, NoneType), "the name of a target, or None")
    loader = load_target(target).loader if target is not None else None
    folder = resolve_model(str(checkpoint), revision=revision)
    with Checkpoint.open(folder) as opened:
        try:
            config, told = read_config_groups(opened.quantization)
            findings = [*of_folder(opened), *told]
            linears = find_linears(opened, trust_remote_code=trust_remote_code)
            within_budget(config, linears)
            values = Values(opened)
            findings += _findings(opened, config, linears, values, target)
        except ConfigError as error:
            raise CheckpointError(f"{folder / 'config.json'}: {error.message}", hint=error.hint) from error
        quantized = sum(opened.is_quantized(linear.name) for linear in linears.linears)
    judged = [finding.for_loader(loader) for finding in findings]
    return CheckReport(folder, target, len(linears.linears), quantized, values.read, in_order(judged))


def _findings(
    opened: Checkpoint, config: Config, linears: Linears, values: Values, target: str | None
) -> Iterator[Finding]:
    if linears.guessed is not None and linears.refused:
        message = f"Transformers raises before it reads a weight: {linears.guessed}"
        yield Finding.of("model-invalid", MODEL, ("transformers",), message, linears.mend)
    if linears.guessed is not None:
        message = f"linears are guessed from tensor names, and dense ones may be missed or misjudged: {linears.guessed}"
        yield Finding.of("not-captured", MODEL, (), message, linears.mend)
    stored = Stored(opened, config, linears, values)
    verdicts = resolve(config, linears, frozenset(n for n in opened.parts if opened.is_quantized(n)))
    comparison = Comparison(config, linears.linears, verdicts, stored.fits)
    yield from comparison.findings()
    modules = {v.resolution.module.name for said in verdicts.values() for v in said}
    modules |= {name for embedding in linears.embeddings for name in (embedding.name, embedding.path.name)}
    yield from unmatched(config, linears, frozenset(modules))
    yield from overlaps(config, comparison.agreed)
    yield from repeated(config)
    for linear in linears.linears:
        meaning = _meaning(linear, verdicts, stored, comparison)
        takers = (verdict.resolution.group for verdict in verdicts[linear.name] if verdict.meaning is None)
        yield from stored.findings(linear, meaning, next((name for name in takers if name is not None), None))
        if opened.is_quantized(linear.name):
            yield from values.findings(linear, meaning)
    embeddings = Embeddings(config)
    for embedding in linears.embeddings:
        yield from embeddings.findings(embedding, stored)
        yield from values.scales(embedding)
    yield from stored.of_model()
    yield from values.tied(linears)
    for key in linears.cache_scales:
        if config.kv_cache is not None and key in opened.reader.tensors:
            yield from values.scale(key, "cache_scale", opened.reader.meta(key))
    yield from values.fused(verdicts)
    if target is not None:
        yield from illegal(target, config, linears, verdicts)
    else:
        yield from unloadable(config, linears, verdicts)


def _meaning(linear: Linear, verdicts: Verdicts, stored: Stored, comparison: Comparison) -> Meaning:
    """What a linear's tensors are judged by: the meaning among the loaders' that they fit, else Transformers'.

    Experts have one group in Transformers, whatever their names: there the config's own words count, then vLLM's.
    """
    said = [v for v in verdicts[linear.name] if v.error is None]
    likely = [v for v in said if stored.fits(linear, v.meaning)]
    if not likely and linear.path.kind == "experts":
        return comparison.named(linear) or next((v.meaning for v in said), None)
    likely += [v for v in said if v.loader == "transformers"]
    return next((verdict.meaning for verdict in [*likely, *said]), None)
