"""Targets and `ignore` entries one by one: what each takes by name, which take nothing, which overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import thread_time
from typing import get_args

from qcompiler.check.config import Config
from qcompiler.check.findings import MODEL, Finding
from qcompiler.check.linears import Linear, Linears
from qcompiler.emit.matchers import transformers_ignores
from qcompiler.emit.patterns import TargetList
from qcompiler.errors import ConfigError
from qcompiler.expressions import REGEX_PREFIX, Engine, Pattern, read_alike

_BUDGET = 20.0  # seconds for all expressions on all names, at most: a thousand times what a large model takes
_LEAST, _EACH = 2.0, 5e-6  # seconds of it for a small model, and for each name and expression: ten times what one takes


class Entries:
    """Targets with their groups, or `ignore` entries, each ready to be matched by itself."""

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries = tuple(dict.fromkeys(entries))
        self._exact = frozenset(entry for entry in self.entries if not entry.startswith(REGEX_PREFIX))
        self.patterns = [pattern for entry in self.entries if _is_regex(entry) for pattern in _patterns(entry)]

    def taking(self, *names: str) -> list[str]:
        """The entries that take one of these names of a linear, in some loader: equal ones, then expressions."""
        exact = [name for name in dict.fromkeys(names) if name in self._exact]
        found = (p.target for p in self.patterns if any(map(p.matches, dict.fromkeys(names))))
        return [*exact, *dict.fromkeys(found)]


def targets_of(config: Config) -> Entries:
    """Every target, in the config's order."""
    return Entries(target for group in config.raw["config_groups"].values() for target in group["targets"])


def groups_of(config: Config) -> Mapping[str, list[str]]:
    """Target -> the groups that have it."""
    owners: dict[str, list[str]] = {}
    for name, group in config.raw["config_groups"].items():
        for target in dict.fromkeys(group["targets"]):
            owners.setdefault(target, []).append(name)
    return owners


def within_budget(config: Config, linears: Linears) -> None:
    """Raise `ConfigError` where all expressions together take too long, though each alone may not."""
    names = {name for linear in linears.linears for name in (linear.name, linear.path.name)}
    patterns = [*targets_of(config).patterns, *Entries(config.raw["ignore"]).patterns]
    budget = min(_BUDGET, _LEAST + _EACH * len(patterns) * len(names))
    start = thread_time()
    for pattern in patterns:
        for name in names:
            pattern.matches(name)
        if thread_time() - start > budget:
            raise ConfigError(
                f"{len(patterns)} expressions on {len(names)} names take longer than {budget:.2g} s",
                hint="do not trust this checkpoint; loaders run these expressions without a limit",
            )


def unmatched(config: Config, linears: Linears, modules: frozenset[str]) -> Iterator[Finding]:
    """Targets and ignores that match nothing. modules: the names of what runtimes fuse."""
    names = {name for linear in linears.linears for name in (linear.name, linear.path.name)} | modules
    parents = {parent for name in names for parent in _parents(name)}
    idle = "no loader looks for it"
    for target, owners in groups_of(config).items():
        if not _takes(target, names, linears) and not target.endswith("Attention"):
            mend = (
                "expressions are matched from the start of a name: begin with `.*`"
                if _is_regex(target)
                else "remove it"
            )
            yield Finding.of("target-unmatched", MODEL, (), f"{owners[0]}: {target!r} matches no linear: {idle}", mend)
    for entry in dict.fromkeys(config.raw["ignore"]):
        if entry in parents:
            message = f"ignore: {entry!r} is no linear but holds some: no loader ignores them for it, but SGLang 0.5.10"
            yield Finding.of("ignore-unmatched", MODEL, (), message, "name the linears, or remove it")
        elif not _takes(entry, names, linears):
            yield Finding.of("ignore-unmatched", MODEL, (), f"ignore: {entry!r} matches no linear", "remove it")


def overlaps(config: Config, linears: Sequence[Linear]) -> Iterator[Finding]:
    """Targets of several groups that take one linear; `linears` are those on which loaders agree."""
    targets, owners = targets_of(config), groups_of(config)
    told: set[tuple[str, ...]] = set()
    for linear in linears:
        taking = targets.taking(linear.name, linear.path.name)
        if len({owner for target in taking for owner in owners[target]}) > 1 and tuple(taking) not in told:
            told.add(tuple(taking))
            yield Finding.of(
                "overlap-alike",
                linear.name,
                (),
                f"{' and '.join(map(repr, taking[:4]))} of different groups take it, and all loaders choose alike",
                "write targets that do not overlap",
            )


def repeated(config: Config) -> Iterator[Finding]:
    """Targets that stand in several groups."""
    for target, owners in groups_of(config).items():
        if len(owners) > 1:
            message = f"{target!r} is a target of {', '.join(owners)}: every loader takes the last, {owners[-1]}"
            yield Finding.of("target-repeated", MODEL, (), message, f"leave it in {owners[-1]} alone")


def read_differently(ignore: Entries, linear: Linear) -> list[str]:
    """The `ignore` entries that cover a linear in some loaders and not in others."""
    return [entry for entry in ignore.entries if _may_cover(entry, linear) and len(set(_covers(entry, linear))) > 1]


def _may_cover(entry: str, linear: Linear) -> bool:
    return _is_regex(entry) or entry.lower() in linear.name.lower() or entry in (linear.path.class_name, "Module")


def _covers(entry: str, linear: Linear) -> Iterator[bool]:
    """Whether an entry covers a linear, in vLLM, Transformers, SGLang, SGLang 0.5.10."""
    one, site = TargetList([entry], "re"), linear.disk
    yield TargetList([entry], "regex").first(site.name) is not None
    yield transformers_ignores(linear.path.name, (linear.path.class_name, "Linear", "Module"), one)
    yield one.first_suffix(site.name) is not None
    yield one.first_containing(site.name) is not None


def _takes(entry: str, names: set[str], linears: Linears) -> bool:
    if _is_regex(entry):
        return any(pattern.matches(name) for pattern in _patterns(entry) for name in names)
    if entry in names or any(entry.lower() in name.lower() for name in ("Linear", *linears.classes)):
        return True  # a part of a class name is enough for vLLM and SGLang
    return linears.guessed is not None and "." not in entry  # a class, for all that is known


def _patterns(entry: str) -> list[Pattern]:
    """An expression, as each engine reads it that reads it differently."""
    return [Pattern(entry, engine) for engine in (get_args(Engine) if not read_alike(entry) else ("re",))]


def _is_regex(entry: str) -> bool:
    return entry.startswith(REGEX_PREFIX)


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name
