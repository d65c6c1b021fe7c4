"""How each loader resolves each linear, by its own matching rules, and where two of them disagree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qcompiler.check.config import Config, Group
from qcompiler.check.entries import Entries, groups_of, read_differently, targets_of
from qcompiler.check.findings import Finding
from qcompiler.check.linears import Linear, Linears
from qcompiler.emit.matchers import Resolution, assignment, is_lm_head
from qcompiler.emit.patterns import TargetList
from qcompiler.emit.sites import RuntimeModule, Site
from qcompiler.expressions import REGEX_PREFIX, read_alike, refusals
from qcompiler.ir.annotations import Structure
from qcompiler.targets import fused_tables

_MATCHERS = (
    ("vllm", "vllm", "vllm"),
    ("transformers", "transformers", "transformers"),
    ("sglang", "sglang", "sglang"),
    ("sglang 0.5.10", "sglang-substring", "sglang"),
)
"""What findings call a loader, its matcher, and whose tables of fused names it uses."""

Meaning = Group | str | None
"""What a loader takes a linear for: a group's content (its name, where it could not be read), or None: dense."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one loader decides for the module that holds a linear."""

    loader: str
    resolution: Resolution
    meaning: Meaning

    @property
    def error(self) -> str | None:
        return self.resolution.error


Verdicts = Mapping[str, Sequence[Verdict]]
"""By each linear's name on disk. A loader that never quantizes a linear (a router) says nothing of it."""


def resolve(config: Config, linears: Linears, stored: frozenset[str]) -> dict[str, list[Verdict]]:
    """What every loader decides; `stored` are the names on disk of linears with quantized tensors.

    Raises `ConfigError` for an expression that does not finish.
    """
    some = next((group.scheme for group in config.groups.values() if group is not None), None)
    found: dict[str, list[Verdict]] = {linear.name: [] for linear in linears.linears}
    for loader, matcher, tables in _MATCHERS:
        sites, names = _sites(loader, linears.linears)
        marked = [replace(site, scheme=some if names[site.name] in stored else None) for site in sites]
        for fused in fused_tables(tables) or ({},):
            for resolution in assignment(matcher, config.raw, marked, fused).resolutions:
                group = resolution.group
                meaning = None if group is None else config.groups.get(group, group)
                verdict = Verdict(loader, resolution, meaning)
                for site in resolution.module.sites:
                    if verdict not in found[names[site.name]]:
                        found[names[site.name]].append(verdict)
    return found


def _sites(loader: str, linears: Sequence[Linear]) -> tuple[list[Site], dict[str, str]]:
    """The linears that a loader may quantize, under its names for them, and each name's name on disk."""
    if loader == "transformers":
        chosen = [(linear.path, linear) for linear in linears if linear.quantizable]
    else:
        # Routers are built without a quantization config, whatever it says.
        chosen = [(linear.disk, linear) for linear in linears if linear.path.structure is not Structure.ROUTER]
    return [site for site, _ in chosen], {site.name: linear.name for site, linear in chosen}


class Comparison:
    """Where a loader raises, and where two give one linear different schemes: each with its cause.

    fits: whether a linear's stored tensors are those of a meaning, so that it is known who is wrong.
    """

    def __init__(
        self, config: Config, linears: Sequence[Linear], verdicts: Verdicts, fits: Callable[[Linear, Meaning], bool]
    ) -> None:
        self._targets, self._owners = targets_of(config), groups_of(config)
        self._ordered = TargetList(self._targets.entries, "regex")
        self._ignore = Entries(config.raw["ignore"])
        self._linears, self._verdicts, self._fits, self._groups = linears, verdicts, fits, config.groups
        self._of = {linear.name: linear for linear in linears}
        self.agreed: list[Linear] = []
        """Linears on which all loaders agree, once `findings` has run."""

    def findings(self) -> Iterator[Finding]:
        told: set[str] = set()  # modules; codes of what is raised in them
        for linear in self._linears:
            said = self._verdicts[linear.name]
            raised = [verdict for verdict in said if verdict.error is not None]
            for verdict in raised:
                finding = _raised(verdict, quantized=not self._fits(linear, None))
                key = f"{finding.code}: {finding.layer}"
                if key not in told:
                    told.add(key)
                    loaders = [v.loader for v in raised if _raised(v, quantized=False).code == finding.code]
                    yield replace(finding, loaders=tuple(dict.fromkeys(loaders)))
            fused = next((v for v in said if v.loader == "vllm" and len(v.resolution.module.sites) > 1), None)
            if fused is not None and fused.resolution.module.is_expert_block:
                fused = None
            module = linear.path.expert_block or (fused.resolution.module.name if fused else linear.name)
            agreed = [verdict for verdict in said if verdict.error is None]
            misread = linear.path.expert_block and raised and not any(self._fits(linear, v.meaning) for v in agreed)
            if module in told or (len({verdict.meaning for verdict in agreed}) < 2 and not misread):
                if module not in told and not raised:
                    self.agreed.append(linear)
                continue
            odd = self._read_oddly(linear)
            together = None if fused is None or fused.error is not None or odd else self._fused(fused)
            if together is not None or linear.path.expert_block:
                told.add(module)
            yield together or self._disagreement(linear, agreed)

    def _fused(self, fused: Verdict) -> Finding | None:
        """What is wrong with linears that vLLM fuses, where each by itself means something else."""
        module = fused.resolution.module
        own = {site.leaf: self._own(site) for site in module.sites}
        if fused.error is not None or all(meaning == fused.meaning for meaning in own.values()):
            return None
        alone = "; ".join(f"{leaf} {short(meaning)}" for leaf, meaning in own.items())
        wrong = self._wrong(module)
        target = self._ordered.first(module.name)
        does = f"vLLM reads all of {module.name} as {short(fused.meaning)}, and Transformers reads {alone}"
        if target is not None and target.startswith(REGEX_PREFIX):
            return Finding.of(
                "fused-name-matched",
                module.name,
                wrong,
                f"{target} takes the fused name: {does}",
                r"anchor the expression at the dot (`re:.*\.up_proj$`), and give all shards one scheme"
                if "vllm" in wrong
                else f"let the expression take {', '.join(own)} too",
            )
        if len(set(own.values())) > 1:
            return Finding.of(
                "fused-shards-differ",
                module.name,
                wrong,
                f"its shards differ: {does}",
                f"give {', '.join(own)} one scheme, and compile again",
            )
        return None

    def _wrong(self, module: RuntimeModule) -> list[str]:
        """The loaders that read a shard otherwise than it is stored; where none does, all that differ."""
        shards = [
            (shard, v) for site in module.sites for v in self._verdicts[site.name] if (shard := self._of[site.name])
        ]
        known = [(shard, verdict) for shard, verdict in shards if verdict.error is None]
        wrong = [verdict.loader for shard, verdict in known if not self._fits(shard, verdict.meaning)]
        return list(dict.fromkeys(wrong or [verdict.loader for _, verdict in known]))

    def named(self, linear: Linear) -> Meaning:
        """What the first target that names a linear gives it, whatever a loader makes of that."""
        taking = self._targets.taking(linear.name, linear.path.name)
        owner = self._owners[taking[0]][0] if taking else None
        return None if owner is None else self._groups.get(owner, owner)

    def _disagreement(self, linear: Linear, said: Sequence[Verdict]) -> Finding:
        by_meaning: dict[Meaning, list[str]] = {}
        for verdict in said:
            by_meaning.setdefault(verdict.meaning, []).append(verdict.loader)
        reads = "; ".join(f"{', '.join(dict.fromkeys(who))}: {short(meaning)}" for meaning, who in by_meaning.items())
        wrong = [v for v in said if not self._fits(linear, v.meaning)]
        loaders = list(dict.fromkeys(verdict.loader for verdict in wrong or said))
        code, because, mend = self._cause(linear, said)
        return Finding.of(code, linear.path.expert_block or linear.name, loaders, f"{because}: {reads}", mend)

    def _cause(self, linear: Linear, said: Sequence[Verdict]) -> tuple[str, str, str]:
        """The code, the reason and the mend of a disagreement."""
        name, path = linear.name, linear.path.name
        if linear.path.kind == "experts":
            return (
                "experts-differ",
                "Transformers gives all experts of a model one group, whatever their names",
                "give all experts one scheme and name them in a target with `experts`, or serve it with vLLM alone",
            )
        taking = self._targets.taking(name, path)
        if odd := self._read_oddly(linear):
            return (
                "loaders-disagree",
                f"{odd[0]!r} means one thing to vLLM (the package regex), another to the rest (Python's re)",
                "write no [[:class:]] and no braces but for counts: escape them where they are meant literally",
            )
        covering = read_differently(self._ignore, linear)
        if covering:
            return (
                "ignore-differs",
                f"the ignore entry {covering[0]!r} covers it in some loaders only",
                "ignore linears by their full names, or by `re:` and an expression with `$`",
            )
        fused = next((v.resolution.module for v in said if len(v.resolution.module.sites) > 1), None)
        if fused is not None and (entries := self._ignore.taking(fused.name)):
            return (
                "ignore-differs",
                f"the ignore entry {entries[0]!r} takes the fused {fused.name}, which Transformers does not have",
                "ignore linears by the names that they have in the files",
            )
        if is_lm_head(RuntimeModule(name, (linear.disk,))) and not taking:
            if not self._fits(linear, None):
                return (
                    "head-by-class",
                    "a class as target takes the head in Transformers alone, and it is stored quantized: the others "
                    "build a dense one, and find no weight for it",
                    f"add {path} to the targets of its group, by its name",
                )
            return (
                "head-by-class",
                "a class as target takes the head in Transformers alone, where it is NaN if it is stored dense",
                f"add {path} to ignore",
            )
        overlapping = len({owner for target in taking for owner in self._owners[target]}) > 1
        vllm = {v.meaning for v in said if v.loader in ("vllm", "transformers")}
        if len(vllm) == 1 and not overlapping:
            return (
                "class-before-shards",
                "SGLang tries the class before the names of the shards of a fused module",
                "use no class as a target beside names: name every linear",
            )
        if overlapping:
            return (
                "targets-overlap",
                f"targets {', '.join(taking[:4])} all take it; vLLM and SGLang try them in the config's order, "
                "Transformers exact names first, then expressions in alphabetical order",
                "write targets that do not overlap",
            )
        return "loaders-disagree", "the loaders' rules differ here", "name the linear exactly in one group or in ignore"

    def _read_oddly(self, linear: Linear) -> list[str]:
        """The targets and ignores that take a linear by an expression which two engines compile to two things."""
        taking = [entry for e in (self._targets, self._ignore) for entry in e.taking(linear.name, linear.path.name)]
        regexes = [entry for entry in taking if entry.startswith(REGEX_PREFIX)]
        return [entry for entry in regexes if not read_alike(entry) and not refusals(entry)]

    def _own(self, site: Site) -> Meaning:
        """What Transformers, which fuses nothing, takes a shard for."""
        return next((v.meaning for v in self._verdicts[site.name] if v.loader == "transformers"), None)


def _raised(verdict: Verdict, *, quantized: bool) -> Finding:
    name, error = verdict.resolution.module.name, verdict.error or ""
    if "Unable to find matching target" in error:
        module = verdict.resolution.module
        taken = "`re:.*experts.*`" if module.is_expert_block else ", ".join(site.leaf for site in module.sites)
        code, mend = "target-missing", f"add {taken} to a target" if quantized else f"add {name} to ignore"
    elif "MoE" in error:
        code, mend = "experts-differ", "give all projections of all experts of the block one scheme"
    else:
        leaves = ", ".join(site.leaf for site in verdict.resolution.module.sites)
        code, mend = "shards-ignored", f"ignore all of {leaves}, or none of them"
    return Finding.of(code, name, (verdict.loader,), f"it raises: {error}", mend)


def short(meaning: Meaning) -> str:
    """A meaning in a word: `w:int4/g128`, `dense`."""
    if meaning is None:
        return "dense"
    return f"group {meaning}" if isinstance(meaning, str) else meaning.scheme.short
