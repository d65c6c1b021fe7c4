"""Read YAML from people one need not trust: no objects, no explosions, no key given twice."""

from __future__ import annotations

from typing import Any

import yaml

from qcompiler.errors import ConfigError

_MAX_BYTES = 1 << 20
_MAX_NODES = 50_000


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, refusing duplicate keys (which it would drop) and aliases that multiply."""

    def compose_document(self) -> yaml.Node:
        node = super().compose_document()
        if node is not None:
            _count(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many nodes a document has once its aliases are written out."""
    known = sizes.get(id(node))
    if known is not None:
        return known
    sizes[id(node)] = _MAX_NODES  # an alias to a node inside itself
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = list(node.value)
    total = 1
    for child in children:
        total += _count(child, sizes)
        if total > _MAX_NODES:
            raise ConfigError(f"the document holds more than {_MAX_NODES} values once its aliases are written out")
    sizes[id(node)] = total
    return total


def load_yaml(text: str, *, where: str) -> Any:
    """Parse one YAML document. Raises `ConfigError` that names `where` and the line."""
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{where} is larger than {_MAX_BYTES} bytes: not a pipeline")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  a subclass of SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where} is not plain YAML: {error}") from error
