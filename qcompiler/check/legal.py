"""What a target cannot load; and without one, what no hardware of a runtime loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qcompiler.check.config import Config, Group
from qcompiler.check.findings import ALL, Finding
from qcompiler.check.linears import Linears
from qcompiler.check.loaders import Verdicts
from qcompiler.emit.sites import Site
from qcompiler.targets import Target, Violation, check, load_target, target_names

_TOLD_OTHERWISE = {"fused-same-scheme"}
_OF_THE_LOADER = {
    "conv1d",
    "dense-router",
    "experts-dense",
    "experts-one-scheme",
    "experts-one-scheme-per-model",
    "fused-block-rows",
    "group-divides",
    "packed-zero-points",
}
"""Rules that are no matter of kernels: where one is broken, weights are loaded wrong or not at all."""


def illegal(name: str, config: Config, linears: Linears, verdicts: Verdicts) -> Iterator[Finding]:
    """Everything that keeps one target from loading the checkpoint."""
    target = load_target(name)
    sites = _sites(target.loader, linears, verdicts)
    for violation in check(target, sites, kv_cache=config.kv_cache, head_sizes=linears.head_sizes):
        if violation.rule not in _TOLD_OTHERWISE:
            message = violation.message.removeprefix(f"{violation.site} ")
            yield Finding.of("illegal", violation.site, (target.loader,), message, violation.mend)


def unloadable(config: Config, linears: Linears, verdicts: Verdicts) -> Iterator[Finding]:
    """What every target of a runtime refuses. Where only kernels are missing, it is a warning."""
    known = [load_target(name) for name in target_names()]
    for loader in ALL:
        targets = [target for target in known if target.loader == loader]
        sites = _sites(loader, linears, verdicts)
        by_name = {site.name: site for site in sites}
        found = [{v.site: v for v in check(target, sites, kv_cache=config.kv_cache)} for target in targets]
        for name, violation in found[0].items():
            everywhere = [violations[name] for violations in found if name in violations]
            if len(everywhere) < len(targets) or violation.rule in _TOLD_OTHERWISE:
                continue
            experts = loader == "transformers" and name in by_name and by_name[name].kind == "experts"
            code = "unloadable" if violation.rule in _OF_THE_LOADER or experts else "no-kernel"
            yield Finding.of(code, name, (loader,), _message(targets, everywhere), violation.mend)


def _message(targets: Sequence[Target], violations: Sequence[Violation]) -> str:
    others = f" (and on {len(targets) - 1} other targets of it)" if len(targets) > 1 else ""
    return f"{violations[0].message.removeprefix(f'{violations[0].site} ')}{others}"


def _sites(loader: str, linears: Linears, verdicts: Verdicts) -> list[Site]:
    """The linears with the schemes that a loader gives them; dense where they are not known."""
    sites = []
    for linear in linears.linears:
        meaning = next((v.meaning for v in verdicts[linear.name] if v.loader == loader), None)
        scheme = meaning.scheme if isinstance(meaning, Group) else None
        sites.append(replace(linear.disk, scheme=scheme, structure=linear.path.structure, kind=linear.path.kind))
    return sites
