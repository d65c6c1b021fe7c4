"""Legality: which sites a target cannot load, before any weight is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qcompiler.emit.sites import RuntimeModule, Site, runtime_modules
from qcompiler.scheme import KVCacheSpec, Scheme, Strategy
from qcompiler.targets.model import Row, Target

MODEL = "(model)"
"""The site name of a violation that belongs to no layer: the KV cache, the head size."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: the site, the rule's id in the target's data, what is wrong, and what to change."""

    site: str
    rule: str
    message: str
    mend: str


def check(
    target: Target, sites: Sequence[Site], *, kv_cache: KVCacheSpec | None = None, head_sizes: Sequence[int] = ()
) -> list[Violation]:
    """Everything that keeps `target` from loading `sites` as they are annotated; empty when it is legal."""
    modules = _modules(target, sites)
    quantized = [site for site in sites if site.scheme is not None]
    return [
        *_check_model(target, kv_cache, head_sizes),
        *(violation for site in quantized for violation in _check_site(target, site, site.scheme)),
        *(violation for module in modules for violation in _check_module(target, module)),
        *_check_experts(target, sites),
    ]


def notes(target: Target, sites: Sequence[Site]) -> list[str]:
    """Where `target` loads `sites` and computes otherwise than their schemes say: a line for each kind."""
    told: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in sites:
        if site.scheme is not None and site.kind != "conv1d":
            row_id, row, _ = _row_for(target, site.scheme, _structure(site))
            if row is not None and row_id in target.notes:
                told[site.scheme.short, row_id].append(site)
    return [
        f"{target.name} does not round the activations of {len(members)} linears as {scheme} says, "
        f"{members[0].name} among them: {target.notes[row_id]}"
        for (scheme, row_id), members in told.items()
    ]


def kernel(target: Target, site: Site) -> str | None:
    """The id of the row that takes a site's scheme; None where none does, or it stays dense."""
    row_id, row, _ = _row_for(target, site.scheme, _structure(site)) if site.scheme is not None else (None, None, None)
    return row_id if row is not None else None


def _check_model(target: Target, kv_cache: KVCacheSpec | None, head_sizes: Sequence[int]) -> Iterator[Violation]:
    if kv_cache is not None and not target.takes_kv_cache(kv_cache):
        yield Violation(
            MODEL,
            "kv-cache",
            f"{target.label} does not take an FP8 KV cache with one scale per {kv_cache.strategy}",
            f"use strategy {' or '.join(target.kv_cache)}" if target.kv_cache else "leave the KV cache as it is",
        )
    for size in head_sizes:
        if target.head_sizes is None or size in target.head_sizes:
            continue
        yield Violation(
            MODEL,
            "head-size",
            f"{target.label} has no attention kernel for heads of {size} (it has {_listed(target.head_sizes)})",
            "serve this model on other hardware: no quantization changes its head size",
        )


def _check_site(target: Target, site: Site, scheme: Scheme | None) -> Iterator[Violation]:
    assert scheme is not None
    if site.kind == "conv1d":
        yield _violation(
            target,
            site,
            "conv1d",
            "compressed-tensors has no on-disk form for Conv1D (transposed) weights",
            "leave it dense",
        )
        return
    structure = _structure(site)
    if structure in target.dense:
        yield _violation(target, site, f"dense-{structure}", target.dense[structure], "leave it dense")
        return
    grouped = scheme.undivided(site.in_features)
    if grouped is not None:
        instead = "strategy channel" if grouped is scheme.weights else "activations per token"
        yield _violation(
            target,
            site,
            "group-divides",
            f"its {site.in_features} inputs do not divide into groups of {grouped.group_size}",
            f"use a group_size that divides {site.in_features}, or {instead}",
        )
    row_id, row, problem = _row_for(target, scheme, structure)
    if problem is not None:
        yield _violation(target, site, row_id, *problem)
    elif row is not None:
        multiple = _in_multiple(row, structure)
        if site.in_features % multiple:
            yield _violation(
                target,
                site,
                row_id,
                f"its {site.in_features} inputs are not a multiple of {multiple}",
                "leave it dense, or choose a scheme without this kernel",
            )


def _row_for(target: Target, scheme: Scheme, structure: str | None) -> tuple[str, Row | None, tuple[str, str] | None]:
    """The row that takes this scheme; or the row to blame, with (what is wrong, the mend)."""
    blamed: tuple[str, tuple[str, str]] | None = None
    for row_id, row in target.rows.items():
        if _misses(row, scheme, structure):
            continue
        if row.refused is not None:
            problem = (row.refused, row.mend or "choose another scheme")
        elif structure in row.not_for:
            problem = (row.not_for[structure], f"leave the {structure} dense, or choose another scheme for it")
        else:
            return row_id, row, None
        blamed = blamed or (row_id, problem)
    if blamed is not None:
        return blamed[0], None, blamed[1]
    allowed = {row_id: row for row_id, row in target.rows.items() if row.refused is None}
    nearest = min(allowed, key=lambda row_id: len(_misses(allowed[row_id], scheme, structure)))
    misses = _misses(allowed[nearest], scheme, structure)
    mends = ", ".join(dict.fromkeys(mend for _, mend in misses if mend)) or f"use one of: {', '.join(allowed)}"
    wrong = " and ".join(dict.fromkeys(what for what, _ in misses))
    return nearest, None, (f"no kernel takes this scheme; the nearest, {nearest}, is missed by {wrong}", mends)


def _misses(row: Row, scheme: Scheme, structure: str | None) -> list[tuple[str, str]]:
    misses = [(f"weights: {what}", mend) for what, mend in row.weights.misses(scheme.weights)]
    activations = scheme.input_activations
    if (activations is None) != (row.activations is None):
        wants = "no activation scheme" if row.activations is None else "an activation scheme"
        miss = (f"activations: it takes {wants}", "drop input_activations" if activations else "add input_activations")
        misses += [miss] * 2  # further off than one wrong number
    elif activations is not None and row.activations is not None:
        misses += [(f"activations: {what}", mend) for what, mend in row.activations.misses(activations)]
    if not misses and row.format not in (None, scheme.format):
        misses.append((f"format {scheme.format} (it takes {row.format})", ""))
    narrowed = row.structures.get(structure or "")
    if narrowed and narrowed.strategies and scheme.weights.strategy not in narrowed.strategies:
        takes = " or ".join(narrowed.strategies)
        misses.append(
            (f"weights: strategy {scheme.weights.strategy} (for {structure} it takes {takes})", f"use {takes}")
        )
    return misses


def _check_module(target: Target, module: RuntimeModule) -> Iterator[Violation]:
    rules, sites = target.fused_rules, module.sites
    if len(sites) > 1 and rules.same_scheme and len({site.scheme for site in sites}) > 1:
        schemes = ", ".join(f"{site.leaf} {site.scheme.short if site.scheme else 'dense'}" for site in sites)
        yield Violation(
            sites[0].name,
            "fused-same-scheme",
            f"{target.label} fuses {module.name} into one linear, but its shards differ: {schemes}; it would load them "
            "all as one of these",
            f"give {', '.join(site.leaf for site in sites)} one scheme",
        )
        return
    scheme = sites[0].scheme
    if scheme is None:
        return
    yield from _check_rows(target, module, scheme)
    weights = scheme.weights
    if weights.block_structure is not None and rules.block_rows:
        rows = weights.block_structure[0]
        for site in sites[:-1]:
            if site.out_features % rows:
                yield _violation(
                    target,
                    site,
                    "fused-block-rows",
                    f"its {site.out_features} outputs are not a multiple of {rows}, and only the last shard of "
                    f"{module.name} may end inside a block",
                    f"use strategy channel for {', '.join(s.leaf for s in sites)}",
                )
    zero_points = not weights.symmetric and weights.strategy in (Strategy.GROUP, Strategy.CHANNEL)
    in_parts = len(sites) > 1 or _structure(sites[0]) == "lm-head"
    if rules.packed_zero_points and zero_points and in_parts:
        for site in sites:
            if site.out_features * weights.bits % 32:
                yield _violation(
                    target,
                    site,
                    "packed-zero-points",
                    f"{site.out_features} zero points of {weights.bits} bits do not fill whole 32-bit words, so "
                    f"{module.name} cannot be put together",
                    "make it symmetric",
                )


def _check_rows(target: Target, module: RuntimeModule, scheme: Scheme) -> Iterator[Violation]:
    """The kernel sees the fused weight: its outputs are all shards' together, a vocabulary's are padded."""
    structure = _structure(module.sites[0])
    row_id, row, _ = _row_for(target, scheme, structure)
    if row is None or structure in target.dense or module.sites[0].kind == "conv1d":
        return
    out = sum(site.out_features for site in module.sites)
    if structure == "lm-head":
        out += -out % target.vocab_padding
    multiple = _out_multiple(row, structure)
    if out % multiple:
        yield _violation(
            target,
            module.sites[0],
            row_id,
            f"the {out} outputs of {module.name} are not a multiple of {multiple}",
            "leave it dense, or choose a scheme without this kernel",
        )


def _check_experts(target: Target, sites: Sequence[Site]) -> Iterator[Violation]:
    blocks: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        if site.expert_block is not None:
            blocks[site.expert_block].append(site)
    if target.experts.same_projections:
        for block, members in blocks.items():
            other = next((site for site in members if site.scheme != members[0].scheme), None)
            if other is not None:
                yield _violation(
                    target,
                    other,
                    "experts-one-scheme",
                    f"all experts of {block} run in one kernel, but {members[0].name} is {_short(members[0])}",
                    f"give every expert projection of {block} one scheme",
                )
    if target.experts.dense_beside_fp8_only:
        schemes = [site.scheme for site in sites if site.scheme is not None]
        dense = next((site for members in blocks.values() for site in members if site.scheme is None), None)
        if dense is not None and schemes and not any(_is_fp8(scheme) for scheme in schemes):
            yield _violation(
                target,
                dense,
                "experts-dense",
                "dense experts do not load beside packed linears: they would stay at random",
                "quantize the experts too, or check this checkpoint in another runtime",
            )
    if target.experts.one_scheme_per_model:
        firsts = [members[0] for members in blocks.values()]
        other = next((site for site in firsts if site.scheme != firsts[0].scheme), None)
        if other is not None:
            yield _violation(
                target,
                other,
                "experts-one-scheme-per-model",
                f"one scheme is read for the experts of all layers, but {firsts[0].name} is {_short(firsts[0])}",
                "give all experts of the model one scheme, or check this checkpoint in another runtime",
            )


def _modules(target: Target, sites: Sequence[Site]) -> list[RuntimeModule]:
    """The runtime's modules by its names, and the fusion groups that the compiler found where names say nothing.

    Experts are modules of their own here, one per projection: their common rules are in `_check_experts`.
    """
    modules: list[RuntimeModule] = []
    for module in runtime_modules(sites, target.fused):
        parts = [RuntimeModule(s.name, (s,)) for s in module.sites] if module.is_expert_block else [module]
        modules += parts
    if not target.fused_rules.same_scheme:
        return modules
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        if site.fusion_group is not None and site.expert_block is None:
            groups[site.fusion_group].append(site)
    by_names = [{site.name for site in module.sites} for module in modules]
    for members in groups.values():
        names = {site.name for site in members}
        if not any(names <= together for together in by_names):
            modules = [m for m in modules if not {s.name for s in m.sites} <= names]
            label = f"{members[0].parent}.[{'+'.join(site.leaf for site in members)}]"
            modules.append(RuntimeModule(label, tuple(members)))
    return modules


def _structure(site: Site) -> str | None:
    return "experts" if site.kind == "experts" else site.structure


def _in_multiple(row: Row, structure: str | None) -> int:
    narrowed = row.structures.get(structure or "")
    return (narrowed.in_multiple if narrowed else None) or row.in_multiple


def _out_multiple(row: Row, structure: str | None) -> int:
    narrowed = row.structures.get(structure or "")
    return (narrowed.out_multiple if narrowed else None) or row.out_multiple


def _is_fp8(scheme: Scheme) -> bool:
    return (scheme.weights.type, scheme.weights.bits) == ("float", 8)


def _short(site: Site) -> str:
    return site.scheme.short if site.scheme else "dense"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _violation(target: Target, site: Site, rule: str, wrong: str, mend: str) -> Violation:
    return Violation(site.name, rule, f"{site.name} ({_short(site)}) on {target.label}: {wrong}", mend)
