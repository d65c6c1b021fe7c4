"""Operators that exist while a model is traced and never run: they mark what is put back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("qcompiler", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define `qcompiler::<schema>` with `fake` as its only implementation, which makes results from shapes alone."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"qcompiler::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.qcompiler, name)
    return operator
