"""How large a model may be: what is larger is a config.json that is damaged or hostile, and would take hours or memory.

Each limit is twice what the largest open models have, or more, and is checked before what it bounds is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from qcompiler.errors import SizeError

MOST_LAYERS = 256  # the deepest models have 126; twice as many are captured in ten seconds
MOST_TRACED = 128  # layers that are traced one by one, each in a quarter of a second: those that no other is like
MOST_MODULES = 100_000  # 61 layers of 256 experts, each expert three modules, are half of that
MOST_CONFIG = 32 << 20  # bytes; the exact names of 100,000 experts take 8 MB
MOST_BYTES = 1 << 30  # of what is computed on the CPU to prove a capture: rotary frequencies, and a tiny twin

LAYERS = re.compile(r"(num|n)_(\w+_)?layers?|decoder_layers")
"""Entries of a config.json that count layers."""


def check_layers(config: Mapping[str, Any], origin: object) -> None:
    """Raise `SizeError` where a config.json, or a part of it, counts more layers than `MOST_LAYERS`."""
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key, value in part.items():
            if LAYERS.fullmatch(str(key)) and isinstance(value, int) and value > MOST_LAYERS:
                raise SizeError(
                    f"{origin}: {key} is {str(value)[:40]}; at most {MOST_LAYERS} layers are captured",
                    hint="correct config.json: the deepest open models have 126 layers",
                )


def check_traced(count: int, name: str) -> None:
    """Raise `SizeError` where so many layers of a model `name` are to be traced one by one."""
    if count > MOST_TRACED:
        raise SizeError(
            f"{name}: {count} decoder layers would have to be traced one by one, as they are not alike; at most "
            f"{MOST_TRACED} are",
            hint="correct config.json: layers of one kind must have the same sizes",
        )


def check_bytes(what: str, tensors: Iterable[Tensor]) -> None:
    """Raise `SizeError` where tensors, on any device, would take more than `MOST_BYTES` on the CPU."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if needed > MOST_BYTES:
        raise SizeError(
            f"{what} would take {needed} bytes to compute; at most {MOST_BYTES} are spent on it",
            hint="correct the sizes in config.json, head_dim and the number of positions among them",
        )


def check_config_size(file: Path) -> None:
    """Raise `SizeError` for a config.json of more than `MOST_CONFIG` bytes."""
    size = file.stat().st_size if file.is_file() else 0
    if size > MOST_CONFIG:
        raise SizeError(
            f"{file}: a config of {size} bytes; at most {MOST_CONFIG} are read", hint="do not trust this model"
        )


@contextmanager
def modules_bounded(name: str) -> Iterator[None]:
    """Within this context, this thread's making of more than `MOST_MODULES` modules raises `SizeError`."""
    made, thread = 0, get_ident()

    def count(parent: nn.Module, key: str, module: nn.Module | None) -> None:
        nonlocal made
        made += get_ident() == thread
        if made > MOST_MODULES:
            raise SizeError(
                f"{name}: the model has more than {MOST_MODULES} modules; no more are built",
                hint="correct config.json: it asks for too many layers, experts or heads",
            )

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
