"""Refuse, before any weight is read, what the target cannot load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator

from qcompiler.emit.config import LOADERS, EmittedConfig, build_quantization_config
from qcompiler.emit.sites import Site
from qcompiler.errors import ConfigError, LegalityError, VerificationError
from qcompiler.ir.annotations import LeafKind, Quant, get_quant, scheme_of, set_quant
from qcompiler.ir.graph import Graph, Stage
from qcompiler.ir.observers import LEAVE_CACHE
from qcompiler.lowering.rehearse import rehearse
from qcompiler.lowering.sites import disk_sites, sites
from qcompiler.pipeline import Context
from qcompiler.pipeline.base import GraphPass
from qcompiler.report import UNVERIFIABLE
from qcompiler.targets import Target, check, load_target, notes

_SHOWN = 8


def _known(name: str) -> str:
    try:
        return load_target(name).name
    except ConfigError as error:  # as a ValueError, pydantic adds where it was written
        raise ValueError(f"{error.message} ({error.hint})") from None


TargetName = Annotated[str, AfterValidator(_known)]


@dataclass(frozen=True, kw_only=True)
class Legalize(GraphPass):
    """Check every scheme against what a runtime on its hardware can load: types, shapes, fusion, names.

    `target` is a runtime with its hardware; the command line's `--target` takes precedence. Conv1D layers (GPT-2) have
    no form in a checkpoint: `conv1d: dense` leaves them as they are and says so. The config that will be written is
    built and proved here, under the name matching of every loader.
    """

    name: ClassVar[str] = "legalize"
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    target: TargetName = "vllm-sm90"
    conv1d: Literal["error", "dense"] = "error"

    def run(self, graph: Graph, context: Context) -> None:
        target = load_target(context.target or self.target)
        context.report.target = target.name
        if self.conv1d == "dense":
            self._leave_conv1d(graph, context)
        everything = sites(graph)
        violations = check(target, everything, kv_cache=graph.kv_cache, head_sizes=context.source.head_sizes)
        if violations:
            asked = {leaf.path: quant.because for node, leaf in graph.linears() if (quant := get_quant(node))}
            shown = "\n".join(
                f"  {v.message} [{v.rule}]; {v.mend}" + "".join(f" ({who})" for who in asked.get(v.site, ()))
                for v in violations[:_SHOWN]
            )
            more = f"\n  and {len(violations) - _SHOWN} more" if len(violations) > _SHOWN else ""
            raise LegalityError(
                f"{target.name} cannot load what was assigned, violations: {len(violations)}\n{shown}{more}",
                hint="change the rules that chose these schemes, or compile for another --target",
            )
        if graph.kv_cache is None and not any(site.scheme for site in everything):
            raise LegalityError(
                "no linear is quantized: every one is dense"
                + (", and Conv1D layers cannot be otherwise" if self._has_conv1d(graph) else "")
                + "".join(f"\n  {note.text}" for note in context.report.notes if note.kind == "warning"),
                hint="let a rule of assign, or a target, mean linears",
            )
        for note in notes(target, everything):
            context.report.info(note)
        self._check_names(graph, context)
        emitted = self._prove(graph, everything, target, context)
        self._try_transformers(graph, everything, emitted, target, context)

    def _prove(self, graph: Graph, everything: list[Site], target: Target, context: Context) -> EmittedConfig:
        """Build the config for every loader, or for those that agree with the target's own: who does not is said."""
        build = partial(
            build_quantization_config,
            everything,
            also=disk_sites(graph, context.source),
            kv_cache=graph.kv_cache,
        )
        try:
            emitted = build()
        except VerificationError:
            emitted = self._prove_for_some(build, target.loader, context)
        graph.loaders = emitted.loaders
        context.report.config_summary = emitted.summary
        return emitted

    def _prove_for_some(self, build: Callable[..., EmittedConfig], own: str, context: Context) -> EmittedConfig:
        try:
            emitted = build(loaders=(own,))
        except VerificationError as error:
            raise LegalityError(error.message, hint=error.hint) from error
        for other in LOADERS:
            if other == own:
                continue
            try:
                emitted = build(loaders=(*emitted.loaders, other))
            except VerificationError as error:
                context.report.fallback(f"the config is not one for {other}: {error.message}")
        return emitted

    def _try_transformers(
        self, graph: Graph, everything: list[Site], emitted: EmittedConfig, target: Target, context: Context
    ) -> None:
        """Transformers is what a checkpoint is verified with, so who compiles for another runtime wants to know."""
        own = target.loader == "transformers"
        violations = [] if own else check(load_target("transformers"), everything, kv_cache=graph.kv_cache)
        if violations:
            context.report.info(f"{UNVERIFIABLE}: {violations[0].message}")
        if violations or not context.source.has_weights:
            return
        rehearsal = rehearse(graph, context.source, emitted.config)
        if rehearsal.unknown is not None:
            context.report.fallback(f"whether Transformers loads this was not rehearsed: {rehearsal.unknown}")
        if rehearsal.refused is not None and own:
            elsewhere = "compile for another --target or --dtype"
            if graph.kv_cache is not None:  # whether it is to blame is seen without it
                dense = {key: said for key, said in emitted.config.items() if key != "kv_cache_scheme"}
                if rehearse(replace(graph, kv_cache=None), context.source, dense).refused is None:
                    raise LegalityError(
                        f"{target.name} cannot load this model with a quantized KV cache: {rehearsal.refused}",
                        hint=f"{LEAVE_CACHE}, or {elsewhere}",
                    )
            raise LegalityError(
                f"{target.name} cannot load what was assigned, though every scheme is legal: {rehearsal.refused}",
                hint="choose another format (FP8 and INT8 keep a tensor `weight`, packed weights do not), leave these "
                f"layers dense, or {elsewhere}",
            )
        if rehearsal.refused is not None:
            context.report.info(f"Transformers cannot verify this checkpoint: {rehearsal.refused}")

    def _has_conv1d(self, graph: Graph) -> bool:
        return any(leaf.kind is LeafKind.CONV1D for _, leaf in graph.linears())

    def _leave_conv1d(self, graph: Graph, context: Context) -> None:
        left = [(node, leaf) for node, leaf in graph.linears() if leaf.kind is LeafKind.CONV1D and scheme_of(node)]
        for node, _ in left:
            present = get_quant(node)
            assert present is not None
            because = (*present.because, f"{self.name}: Conv1D has no form in a checkpoint")
            set_quant(node, Quant(None, "none", because), replacing=present)
        if left:
            context.report.fallback(
                f"{len(left)} Conv1D layers stay dense (conv1d: dense), {left[0][1].path} among them: "
                "compressed-tensors has no form for them"
            )

    def _check_names(self, graph: Graph, context: Context) -> None:
        """Weights that Transformers assembles at load have no key of their own to write codes under."""
        source = context.source
        if not source.has_weights:
            context.report.info("no weight files: names on disk were not checked")
            return
        for node, leaf in graph.linears():
            path = f"{leaf.path}.weight"
            if scheme_of(node) is None or path in source.names.aliases:
                continue
            obstacle = source.names.obstacle(path)
            if obstacle is not None:
                raise LegalityError(
                    f"{leaf.path} has a scheme, but its codes have no name on disk: {obstacle}",
                    hint="ignore this layer in assign",
                )
