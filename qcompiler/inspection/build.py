"""A document of a graph: its nodes with what is known and decided about them, its groups, its bytes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import JsonValue
from transformers import PreTrainedModel

from qcompiler.inspection.document import Candidate, Group, Measures, ModelFacts, Node, Verdict
from qcompiler.inspection.experts import experts_of
from qcompiler.inspection.plain import plain, plain_annotations
from qcompiler.ir import fx
from qcompiler.ir.annotations import Considered, Leaf, Quant, Rescale, Role, Scope, get, get_quant, observed
from qcompiler.ir.graph import Graph
from qcompiler.ir.observers import observers
from qcompiler.ir.ops import OPS, fake_quantize, observe
from qcompiler.ir.partition import partitions
from qcompiler.ir.printer import Printer
from qcompiler.lowering.sites import sites
from qcompiler.patterns.nearest import nearest_at
from qcompiler.patterns.vocabulary import source as source_of
from qcompiler.report import LayerRow
from qcompiler.source import ModelSource
from qcompiler.targets import MODEL, Target, Violation, check, kernel

_CONFIG = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
)
_MEASURES = tuple(Measures.model_fields)


def model_facts(model: PreTrainedModel, name: str, layers: int) -> ModelFacts:
    config: Any = getattr(model, "config", None)
    said = {key: value for key in _CONFIG if isinstance(value := getattr(config, key, None), (bool, int, float, str))}
    return ModelFacts(
        name=name,
        class_name=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        layers=layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        config=said,
    )


def build_nodes(
    graph: Graph, source: ModelSource, printer: Printer, rows: Mapping[str, LayerRow], verdicts: Mapping[str, Verdict]
) -> tuple[Node, ...]:
    """Every node of the graph. `rows` and `verdicts` are by module path, and may lack any."""
    part_of = {node: part.name for part in partitions(graph) for node in part.nodes}
    near, experts = _nearest(graph), experts_of(graph, source)
    found = []
    for node in graph.nodes:
        made = _node(node, printer, part_of.get(node), rows, verdicts)
        more = {"nearest": near.get(node), "experts": experts.get(made.path or "")}
        found.append(made.model_copy(update=more))
    return tuple(found)


def _nearest(graph: Graph) -> dict[fx.Node, str]:
    """What each linear of a layer nearly is, where no structure was found for it; layers that are alike, once."""
    told: dict[str, str] = {}
    found: dict[fx.Node, str] = {}
    for node, leaf in graph.linears():
        role = get(node, Role)
        if role is not None and role.structure is None and role.layer is not None:
            kind = re.sub(r"\.\d+\.", ".*.", leaf.path)
            if kind not in told:
                told[kind] = nearest_at(graph, node)
            found[node] = told[kind]
    return found


def _node(
    node: fx.Node,
    printer: Printer,
    partition: str | None,
    rows: Mapping[str, LayerRow],
    verdicts: Mapping[str, Verdict],
) -> Node:
    leaf, scope = get(node, Leaf), get(node, Scope)
    fields: dict[str, Any] = {
        "name": _name(printer, node),
        "op": printer.called(node),
        "kind": _kind(node, leaf),
        "inputs": tuple(_name(printer, read) for read in fx.inputs(node)),
        "arguments": printer.arguments(node),
        "shape": printer.sizes(node),
        "partition": partition,
        "module": scope.calls[-1][1] if scope and scope.calls else None,
        "annotations": plain_annotations(node),
    }
    if leaf is not None:
        fields |= _leaf_fields(node, leaf) | _decision(get_quant(node), leaf)
        fields["verdict"] = verdicts.get(leaf.path)
        if (row := rows.get(leaf.path)) is not None:
            fields |= _row_fields(row)
        quant = get_quant(node)
        if quant is not None and quant.solver != "stored":  # of what is stored, the report may know more
            fields["because"] = quant.because
        fields["candidates"] = tuple(_candidates(node))
    if (statistic := observed(node)) is not None:
        fields["observes"] = statistic.id
        fields["because"] = statistic.because
    return Node.model_validate(fields)


def _kind(node: fx.Node, leaf: Leaf | None) -> str:
    if leaf is not None:
        return str(leaf.kind)
    if node.target in OPS.values():
        return "inserted"
    return {"placeholder": "input", "get_attr": "attribute", "output": "output"}.get(node.op, "operation")


def _leaf_fields(node: fx.Node, leaf: Leaf) -> dict[str, Any]:
    role = get(node, Role)
    return {
        "path": leaf.path,
        "class_name": leaf.class_name,
        "parameters": leaf.parameters,
        "weight_shape": (leaf.out_features, leaf.in_features) if leaf.out_features else None,
        "structure": str(role.structure) if role and role.structure else None,
        "layer": role.layer if role else None,
        "input_group": role.input_group if role else None,
        "fusion_group": role.fusion_group if role else None,
        "observers": tuple(found.id for found in observers(node)) if fx.inputs(node) else (),
    }


def _decision(quant: Quant | None, leaf: Leaf) -> dict[str, Any]:
    if quant is None:
        return {}
    scheme = quant.scheme
    return {
        "decided": True,
        "scheme": plain(scheme.model_dump(mode="json", exclude_none=True)) if scheme else None,
        "scheme_name": scheme.short if scheme else None,
        "format": str(scheme.format) if scheme else None,
        "algorithm": quant.algorithm if scheme else None,
        "solver": quant.solver if scheme else None,
        "run": quant.run,
        "because": quant.because,
    }


def _candidates(node: fx.Node) -> Iterator[Candidate]:
    """The rules that were weighed for a linear, and what came of each: the first words of `because` say who decided."""
    considered, quant = get(node, Considered), get_quant(node)
    winner = quant.because[0] if quant is not None and quant.because else None
    won = False
    for claim in considered.claims if considered is not None else ():
        outcome, because = "overridden", f"by {winner}" if winner else "by what the checkpoint holds"
        if claim.missed:
            outcome, because = "missed", claim.missed
        elif claim.hidden:
            outcome, because = "hidden", f"by {claim.hidden}"
        elif claim.who == winner and not won:
            outcome, because, won = "decides", "", True
        yield Candidate.model_validate(
            {
                "who": claim.who,
                "selects": claim.selects,
                "becomes": claim.becomes,
                "outcome": outcome,
                "because": because,
            }
        )


def _row_fields(row: LayerRow) -> dict[str, Any]:
    measured = {key: value for key in _MEASURES if (value := getattr(row, key)) is not None}
    return {
        "bytes": row.bytes,
        "dense_bytes": row.dense_bytes,
        "bits_per_weight": row.bits_per_weight,
        "transform": row.transform,
        "because": (row.because,) if row.because else (),
        "measures": Measures(**measured) if measured else None,
    }


def verdicts_of(graph: Graph, target: Target, head_sizes: Iterable[int]) -> tuple[dict[str, Verdict], list[Violation]]:
    """What a target says of each quantized linear, by path, and what keeps it from loading anything else."""
    everything = sites(graph)
    paths = {leaf.path for _, leaf in graph.leaves()}
    broken: dict[str, list[Violation]] = defaultdict(list)
    for violation in check(target, everything, kv_cache=graph.kv_cache, head_sizes=tuple(head_sizes)):
        broken[_owner(violation.site, paths)].append(violation)
    found = {
        site.name: Verdict(legal=True, kernel=kernel(target, site))
        for site in everything
        if site.scheme is not None and site.name not in broken
    }
    elsewhere = broken.pop(MODEL, [])
    for path, violations in broken.items():
        found[path] = Verdict(
            legal=False,
            problems=tuple(f"{violation.message} [{violation.rule}]" for violation in violations),
            mends=tuple(dict.fromkeys(violation.mend for violation in violations)),
        )
    return found, elsewhere


def _owner(site: str, paths: set[str]) -> str:
    """The module of the graph that a site is, or is a part of: experts are sites one by one."""
    owner = site
    while owner and owner not in paths:
        owner = owner.rpartition(".")[0]
    return owner or MODEL


def build_groups(graph: Graph, printer: Printer) -> tuple[Group, ...]:
    """Input groups, fusion groups, rescaled groups and shared statistics, in the order in which they run."""
    inputs: dict[str, list[fx.Node]] = defaultdict(list)
    fused: dict[str, list[fx.Node]] = defaultdict(list)
    watched: dict[str, list[fx.Node]] = defaultdict(list)
    first: dict[str, fx.Node] = {}
    for node, leaf in graph.leaves():
        first.setdefault(leaf.path, node)
        role = get(node, Role)
        if role and role.input_group is not None:
            inputs[role.input_group].append(node)
        if role and role.fusion_group is not None:
            fused[role.fusion_group].append(node)
    for node in graph.nodes:
        if (statistic := observed(node)) is not None:
            watched[statistic.id].append(node)

    def named(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
        return tuple(_name(printer, node) for node in nodes)

    groups = [
        Group(id=id, kind="input", members=named(members), producer=_name(printer, _read_by(members[0])))
        for id, members in inputs.items()
    ]
    groups += [Group(id=id, kind="fusion", members=named(members)) for id, members in fused.items()]
    for node in graph.nodes:
        if (rescale := get(node, Rescale)) is not None:
            groups.append(
                Group(
                    id=rescale.id,
                    kind="rescale",
                    members=named(first[path] for path in rescale.consumers),
                    producer=_name(printer, node),
                    words=f"{rescale.transform.name}: {rescale.kind}",
                    details=_details(rescale),
                )
            )
    for id, nodes in watched.items():
        statistic = observed(nodes[0])
        assert statistic is not None
        consumers = [first[path] for path in statistic.consumers if path in first]
        details = _details(statistic)
        groups.append(
            Group(id=id, kind="observer", members=named([*nodes, *consumers]), producer=None, details=details)
        )
    return tuple(groups)


def _details(annotation: object) -> dict[str, JsonValue]:
    found = plain(annotation)
    assert isinstance(found, dict)
    return found


def _read_by(linear: fx.Node) -> fx.Node:
    """The tensor that a linear reads, whatever was inserted before it."""
    node = source_of(linear)
    while node.target in (observe, fake_quantize):
        node = source_of(node)
    return node


def _name(printer: Printer, node: fx.Node) -> str:
    return printer.name(node).removeprefix("%")
