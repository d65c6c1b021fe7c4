"""The same graph of the same model, with every module and parameter renamed at random."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from torch import fx, nn
from transformers import PreTrainedModel

from qcompiler.capture.roles import annotate_roles
from qcompiler.ir.annotations import Leaf, Role, Scope, get
from qcompiler.ir.graph import Graph


class Renaming:
    """A random new name for every component of every path; children of one module keep different names."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._names: dict[str, str] = {"": ""}
        self._taken: set[str] = set()

    def path(self, old: str) -> str:
        if old not in self._names:
            parent = self.path(old.rpartition(".")[0])
            self._names[old] = f"{parent}.{self.name()}" if parent else self.name()
        return self._names[old]

    def name(self) -> str:
        while (name := "".join(self._random.choices("abcdefghij", k=8))) in self._taken:
            pass
        self._taken.add(name)
        return name

    def key(self, old: str) -> str:
        """The key of a module call: a path, and after @ which call it is."""
        path, at, count = old.partition("@")
        return self.path(path) + at + count


def renamed(graph: Graph, *, seed: int) -> Graph:
    """A copy of `graph` under other names, its roles found anew.

    Its model is a bare tree of modules and their parameters. Modules that the graph calls keep their class.
    """
    names = Renaming(seed)
    new = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        nodes[node] = copy = new.node_copy(node, nodes.__getitem__)
        copy.name = names.name()
        if node.op in ("get_attr", "call_module"):
            copy.target = names.path(str(node.target))
        copy.meta["qcompiler"] = {type(fact): fact for fact in _facts(names, node)}
    constants = {names.path(name): constant for name, constant in graph.constants.items()}
    result = Graph(new, cast(PreTrainedModel, _tree(graph, names)), constants=constants)
    annotate_roles(result)
    return result


def _facts(names: Renaming, node: fx.Node) -> Iterator[Leaf | Scope]:
    if leaf := get(node, Leaf):
        yield replace(leaf, path=names.path(leaf.path), class_name=names.name())
    if scope := get(node, Scope):
        yield Scope(tuple((names.key(key), names.path(path)) for key, path in scope.calls))


def _tree(graph: Graph, names: Renaming) -> nn.Module:
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    made: dict[str, nn.Module] = {}
    for path, module in graph.model.named_modules(remove_duplicate=False):
        if path in called:
            made[path] = copy.copy(module)
            made[path]._modules = {}
        else:
            made[path] = nn.ModuleList() if isinstance(module, nn.ModuleList) else nn.Module()
            made[path]._parameters = {
                names.path(f"{path}.{name}").rpartition(".")[2]: p for name, p in module._parameters.items()
            }
        if path:
            made[path.rpartition(".")[0]]._modules[names.path(path).rpartition(".")[2]] = made[path]
    return made[""]


def structure(graph: Graph) -> list[tuple[object, ...]]:
    """What the roles say, in graph order, without their reasons (which name nodes)."""
    roles = [get(node, Role) for node in graph.nodes]
    return [(r.structure, r.layer, r.input_group, r.fusion_group) for r in roles if r is not None]
