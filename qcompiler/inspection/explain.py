"""Why a node is what it is: the rules that were weighed, what it belongs to, what a runtime says, what it cost."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import JsonValue
from rich.text import Text

from qcompiler.inspection.columns import Cell, Column, laid_out
from qcompiler.inspection.dataflow import Dataflow, Ends
from qcompiler.inspection.document import LISTED_KINDS, Candidate, Document, Group, Node
from qcompiler.inspection.text import Styles, because, braced, parts_words, scheme_word, shape_word
from qcompiler.show import human

_SHOWN = 6
_Line = tuple[str, str, str]
"""A word, what is to be said of it, and the style of that."""

_INDENT = 15
_UNBOUNDED = 10_000
_WORDS: dict[str, str] = {"decides": "bold green", "overridden": "yellow", "hidden": "yellow", "missed": "dim"}
_RULES = (Column("rule"), Column("selects"), Column("would become"), Column("outcome"))


def explain_lines(document: Document, name: str, width: int) -> list[Text]:
    """Everything that is known of the node or group `name`. Raises `ConfigError` with near names where it is none."""
    if groups := document.groups_of(name):
        return [line for group in groups for line in _group_lines(document, group, width)]
    node = document.find(name)
    lines = [_title(node), *_told((*_asked(node, name), *_decided(document, node)), width)]
    if node.candidates:
        lines += _told([("rules", "", "")], width)
        lines += _rules(node.candidates, width)
    elif node.kind in LISTED_KINDS and document.stage != "captured":
        lines += _told([("rules", "none means it, and none misses it by one key alone", "")], width)
    rest = (*_dataflow(document, node), *_groups(document, node), *_verdict(document, node), *_cost(node))
    return [*lines, *_told(rest, width)]


def _group_lines(document: Document, group: Group, width: int) -> Iterator[Text]:
    """A group: what its members share, and each of them."""
    members = [document.by_name[name] for name in group.members]
    yield Text(group.id, style="bold").append(f"  {group.kind} group of {len(members)}", style="not bold dim")
    if group.kind == "rescale":
        yield from _told([("rescaled", f"{group.words}; {_pair(group, document.by_name)}", "")], width)
    else:
        shared = {
            "input": f"one tensor is read, %{group.producer}",
            "fusion": "runtimes fuse these, and need one scheme for all",
            "observer": f"one statistic is collected; {_some(_texts(group.details.get('because')))}",
        }
        yield from _told([("because", shared[group.kind], "")], width)
    styles = Styles(document.listed)
    rows = [
        [Cell(node.path or f"%{node.name}"), Cell(scheme_word(node), styles.of(node)), Cell(because(node), "dim")]
        if node.kind in LISTED_KINDS
        else [Cell(node.path or f"%{node.name}"), Cell(node.kind, "dim"), Cell("")]
        for node in members
    ]
    yield from laid_out((Column("member"), Column("becomes"), Column("because", rank=1)), rows, width, indent=4)


def _title(node: Node) -> Text:
    line = Text(node.path or f"%{node.name}", style="bold")
    facts = [f"%{node.name}" if node.path else "", node.class_name or node.op, shape_word(node)]
    facts += [f"layer {node.layer}" if node.layer is not None else node.partition or ""]
    return line.append(f"  {', '.join(filter(None, facts))}", style="not bold dim")


def _asked(node: Node, name: str) -> Iterator[_Line]:
    """What one node stands for, where that is many weights, and which of them was asked for."""
    if node.experts is None:
        return
    words = f"{node.experts.count} experts, which the graph runs as one node: {parts_words(node.experts)}"
    yield "stands for", words, ""
    if node.experts.holds(name):
        yield "asked for", f"{name}: one of these, and treated as all of them", ""


def _decided(document: Document, node: Node) -> Iterator[_Line]:
    if node.kind in LISTED_KINDS:
        style = Styles(document.listed).of(node)
        how = f" by {node.algorithm}" if node.algorithm else ""
        how += f", run {node.run}" if node.run not in (None, 1) else ""
        stored = f", stored as {node.format}" if node.format else ""
        asked = "" if document.stage != "captured" else " as it is: no rule has been asked"
        yield "becomes", f"{scheme_word(node)}{how}{stored}{asked}", style
        if node.because:
            yield "because", because(node), ""
    if node.path is not None and (role := node.annotations.get("Role")) is not None:
        if node.structure is not None:
            yield "structure", f"{node.structure}: {role.get('because')}", ""
        elif node.kind in LISTED_KINDS:
            yield "structure", f"none: rules can select it by name only; {node.nearest or role.get('because')}", ""


def _rules(candidates: Sequence[Candidate], width: int) -> Iterator[Text]:
    """A line for each rule; where they would not fit, a paragraph."""
    rows = [_rule(candidate) for candidate in candidates]
    table = laid_out(_RULES, rows, _UNBOUNDED, indent=4)
    if max(line.cell_len for line in table) <= width:
        yield from table
        return
    for who, selects, becomes, outcome in rows:
        said = f"{who.text} {selects.text} for {becomes.text}: {outcome.text}"
        lines = textwrap.wrap(said, max(width, 24), initial_indent="    ", subsequent_indent="      ")
        yield from (Text(line, style=outcome.style) for line in lines)


def _rule(candidate: Candidate) -> list[Cell]:
    outcome = candidate.outcome if candidate.outcome != "missed" else "misses it, by"
    words = f"{outcome} {candidate.because}".strip()
    style = _WORDS[candidate.outcome]
    return [Cell(candidate.who), Cell(candidate.selects), Cell(candidate.becomes), Cell(words, style)]


def _dataflow(document: Document, node: Node) -> Iterator[_Line]:
    """What a module reads and what it feeds; of an operation, the nodes beside it too."""
    flow, by_name = Dataflow(document), document.by_name
    read = [by_name[name] for name in node.inputs]
    if node.path is not None and (tensor := flow.tensor(node)) is not None:
        read = [tensor, *(other for other in read[1:] if other.kind in LISTED_KINDS)]
    made = flow.before(node)
    if read:
        told = [_shaped(other) + (", the residual stream" if other.name in flow.residual else "") for other in read]
        of = _ends(made, [other.name for other in read])
        yield "reads", ", ".join(told) + (f"; made of {of}" if of else ""), ""
    readers = document.readers.get(node.name, ())
    if node.path is None and readers:
        yield "read by", _some([_shaped(by_name[name]) for name in readers]), ""
    fed = flow.after(node)
    if fed.weights or fed.streams:
        then = [flow.next_reader(stream) for stream in fed.streams[:1]]
        after = f", which {then[0].path} reads next" if then and then[0] is not None else ""
        yield "feeds", _ends(fed, []) + after, ""
    if node.name in flow.residual:
        yield "is", "the residual stream: a branch is added to what it branched from", ""
    if node.observes is not None:
        group = next((g for g in document.groups if g.kind == "observer" and g.id == node.observes), None)
        for_whom = [by_name[m].path or m for m in group.members if by_name[m].path] if group else []
        yield "collects", f"{node.observes}, for {_some(for_whom)}; {because(node)}", ""


def _ends(found: Ends, without: Sequence[str]) -> str:
    """The nearest weights and the residual stream, those left out that are told already."""
    told = [_some([str(node.path) for node in found.weights if node.name not in without])]
    told += [f"the residual stream %{node.name}" for node in found.streams if node.name not in without]
    return " and ".join(filter(None, told))


def _groups(document: Document, node: Node) -> Iterator[_Line]:
    by_name = document.by_name
    for group in document.groups:
        others = [by_name[name].path or name for name in group.members if name != node.name]
        mine = node.name in group.members
        if group.kind == "input" and mine:
            alone = f"{group.id}: reads %{group.producer}" + (f" with {_some(others)}" if others else " alone")
            yield "input group", alone, ""
        elif group.kind == "fusion" and mine:
            yield "fused with", f"{_some(others)} ({group.id}): runtimes need one scheme for all", ""
        elif group.kind == "rescale" and mine:
            yield "rescaled", f"{group.words}; {_pair(group, by_name)}", ""
        elif group.kind == "rescale" and group.producer == node.name:
            yield "rescales", f"{group.words}; {_pair(group, by_name)}", ""
        elif group.kind == "observer" and mine and node.path is not None:
            stands = [f"%{name}" for name in group.members if by_name[name].path is None]
            yield "observed", f"{group.id}, at {_some(stands)}", ""


def _pair(group: Group, by_name: Mapping[str, Node]) -> str:
    """Who gives the scale to whom, and which parameters that changes."""
    consumers = [by_name[name].path or name for name in group.members]
    producer = by_name[group.producer].path if group.producer is not None else None
    asked = _texts(group.details.get("asked"))
    only = f", asked for by {_some(asked)}" if len(asked) < len(consumers) else ""
    return f"{producer or group.producer} is divided by the scale, {_some(consumers)} multiplied{only}"


def _texts(value: JsonValue) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _verdict(document: Document, node: Node) -> Iterator[_Line]:
    if node.verdict is None:
        if node.kind in LISTED_KINDS and document.target is None:
            yield "target", "none was asked: --target names one", "dim"
        return
    if node.verdict.legal:
        kernel = f", by kernel {node.verdict.kernel}" if node.verdict.kernel else ""
        yield "target", f"{document.target} loads it{kernel}", ""
    for problem in node.verdict.problems:
        yield "target", problem, "bold red"
    for mend in node.verdict.mends:
        yield "mend", mend, ""


def _cost(node: Node) -> Iterator[_Line]:
    if node.bytes is not None and node.dense_bytes is not None:
        smaller = node.scheme_name is not None and node.bytes > 0
        was = (
            f" of {human(node.dense_bytes)} dense, {node.dense_bytes / node.bytes:.2f} times smaller" if smaller else ""
        )
        bits = f", {node.bits_per_weight:.2f} bits per weight" if node.bits_per_weight is not None else ""
        yield "bytes", f"{human(node.bytes)}{was}{bits}", ""
    found = node.measures
    if found is None:
        return
    if found.error is not None:
        yield "error", f"{found.error:.3e} of the weight's square", ""
    if found.output_error is not None:
        nearest = found.nearest_output_error
        share = f" ({found.output_error / nearest:.0%} of rounding to nearest)" if nearest else ""
        yield "output error", f"{found.output_error:.3e} of the output's square{share}", ""
    if found.transform_gain is not None:
        ratio = f", exponent {found.ratio:g}" if found.ratio is not None else ""
        yield "transform", f"{node.transform}: output error {found.transform_gain:.0%} of that without{ratio}", ""
    if found.damping is not None:
        dead = f", {found.dead_columns} inputs are always zero" if found.dead_columns else ""
        yield "solver", f"{node.solver}: damping {found.damping:g} of the mean diagonal{dead}", ""


def _shaped(node: Node) -> str:
    shape = f" [{','.join(node.shape)}]" if node.shape is not None else ""
    return f"{node.path or f'%{node.name}'}{shape}"


def _some(words: Sequence[str]) -> str:
    more = len(words) - _SHOWN
    return braced(words[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _told(lines: Iterable[_Line], width: int) -> Iterator[Text]:
    """Words in one column, what is said of them in another, as wide as there is room."""
    for word, said, style in lines:
        parts = textwrap.wrap(said, max(width - _INDENT, 20), break_long_words=False, break_on_hyphens=False) or [""]
        for index, part in enumerate(parts):
            head = f"  {word:<{_INDENT - 2}}" if index == 0 else " " * _INDENT
            line = Text(head).append(part, style=style or None)
            line.rstrip()
            yield line
