"""Read YAML from people one need not trust: no objects, no explosions, no key given twice. It knows each value's line.

Scalars follow YAML 1.2's core schema. The 1.1 of PyYAML reads `layers: 2:10` as the number 130, and `no` as false.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import yaml

from qcompiler.errors import ConfigError

_MAX_CHARACTERS = 1 << 18
_MAX_NODES = 50_000
_PLAIN_YAML = "mend it there: a pipeline is mappings, lists, words and numbers"
_TAG = "tag:yaml.org,2002:"
_PLAIN = frozenset(_TAG + kind for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge"))
_FLOAT = re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|\.(?:inf|nan))$")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  PyYAML's own declaration


class _Dumper(yaml.SafeDumper):
    """Quotes whatever any YAML would read as something else than text, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"^<<$"), ["<"])
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands: `file.yaml:12: passes[0].assign.rules[1].scheme`."""

    where: str
    root: yaml.Node | None = None
    path: tuple[str | int, ...] = ()

    def at(self, *parts: str | int) -> Place:
        return replace(self, path=(*self.path, *parts))

    def known(self) -> Place:
        """The nearest enclosing place that the document holds."""
        return replace(self, path=self.path[: self._walk()[1]])

    def __str__(self) -> str:
        node, _ = self._walk()
        line = f":{node.start_mark.line + 1}" if node is not None else ""
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).lstrip(".")
        return f"{self.where}{line}" + (f": {path}" if path else "")

    def _walk(self) -> tuple[yaml.Node | None, int]:
        """The deepest node on the way, its key where it has one, and how many steps of the way there are."""
        node, shown, steps = self.root, self.root, 0
        for part in self.path:
            if isinstance(node, yaml.MappingNode):
                # The last one counts: what `<<` merges stands before what it is merged into.
                found = next(((k, v) for k, v in reversed(node.value) if k.value == str(part)), None)
                if found is None:
                    break
                shown, node = found
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                shown = node = node.value[part]
            elif not (isinstance(node, yaml.ScalarNode) and node.value == part):  # `- legalize` stands for its mapping
                break
            steps += 1
        return shown, steps


def load_yaml(text: str, *, where: str) -> tuple[Any, Place]:
    """Parse one YAML document; `Place` tells its lines. Raises `ConfigError` that names `where` and the line."""
    if len(text) > _MAX_CHARACTERS:
        raise ConfigError(
            f"{where} is longer than {_MAX_CHARACTERS} characters: not a pipeline", hint="give a YAML file of passes"
        )
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None, Place(where)
        _size(root, {}, where)
        return loader.construct_document(root), Place(where, root)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        words = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}{line}: not plain YAML: {words}", hint=_PLAIN_YAML) from error
    except RecursionError:
        raise ConfigError(f"{where} nests too deeply: not a pipeline", hint=_PLAIN_YAML) from None
    except (yaml.YAMLError, ValueError, KeyError) as error:  # the latter two: `!!int many`, `!!bool maybe`
        raise ConfigError(f"{where}: not plain YAML: {error}", hint=_PLAIN_YAML) from error


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `load_yaml` reads back as it was."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110))


def _size(node: yaml.Node, sizes: dict[int, int], where: str) -> int:
    """How many values a node holds once its aliases are written out; refuses tags and keys that no pipeline needs."""
    known = sizes.get(id(node))
    if known is not None:
        return known
    line = f"{where}:{node.start_mark.line + 1}"
    if node.tag not in _PLAIN:
        raise ConfigError(f"{line}: a value of type {node.tag} has no place here", hint="only plain values are read")
    sizes[id(node)] = _MAX_NODES  # an alias to a node inside itself
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, where)
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    total = 1
    for child in children:
        total += _size(child, sizes, where)
        if total > _MAX_NODES:
            raise ConfigError(
                f"{line}: more than {_MAX_NODES} values once aliases are written out: not a pipeline",
                hint="write it without aliases (`*name`)",
            )
    sizes[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        line = f"{where}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TAG + "str", _TAG + "merge"):
            raise ConfigError(
                f"{line}: a key is a word, not {key.value!r}"
                if isinstance(key.value, str)
                else f"{line}: a key is a word, not a {key.id}",
                hint="put it in quotes, if it is meant as a name",
            )
        if key.value in seen:
            raise ConfigError(f"{line}: key {key.value!r} is given twice", hint="keep one of the two")
        seen.add(key.value)
