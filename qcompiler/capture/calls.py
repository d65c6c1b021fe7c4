"""Stand between a module and its callers for a while, without a hook or an attribute that could stay behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

Around = Callable[..., Any]
"""Called in place of a module's forward, with that forward and its arguments: `around(forward, *args, **kwargs)`."""

_DECORATED = torch.no_grad()(lambda: None).__code__
"""The code of every function that a context of torch decorates."""


@contextmanager
def intercepted(modules: Mapping[nn.Module, Around]) -> Iterator[None]:
    """Within this context each module calls what `modules` maps it to in place of its forward.

    A module becomes an instance of a subclass of its class: torch's tracer calls modules through proxies that subclass
    the module's class in turn, and only a method of that class is handed the proxy, which knows the path.
    """
    classes = {module: type(module) for module in modules}
    try:
        for module, around in modules.items():
            module.__class__ = _with_forward(classes[module], around)
        yield
    finally:
        for module, cls in classes.items():
            module.__class__ = cls


@contextmanager
def undecorated(model: nn.Module) -> Iterator[None]:
    """Within this context, which stands within `torch.no_grad`, forwards are called without a `no_grad` of their own.

    The tracer notes whoever turns gradients off and on again as two operations, for each of which torch then splits the
    traced graph, only to join it again: a tenth of the time of a trace.
    """
    assert not torch.is_grad_enabled()
    classes = {module: type(module) for module in model.modules() if _turns_gradients_off(type(module).forward)}
    plain = {cls: _subclass(cls, vars(cls.forward)["__wrapped__"]) for cls in set(classes.values())}
    try:
        for module, cls in classes.items():
            module.__class__ = plain[cls]
        yield
    finally:
        for module, cls in classes.items():
            module.__class__ = cls


def _turns_gradients_off(forward: Callable[..., Any]) -> bool:
    """Whether `@torch.no_grad()` is the outermost decorator: torch keeps the context to enter in a closure."""
    code, cells = getattr(forward, "__code__", None), getattr(forward, "__closure__", None) or ()
    kept = [cell.cell_contents for cell in cells] if code is _DECORATED else []
    return any(isinstance(getattr(value, "__self__", None), torch.no_grad) for value in kept)


def _with_forward(cls: type[nn.Module], around: Around) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(partial(cls.forward, self), *args, **kwargs)

    return _subclass(cls, forward)


def _subclass(cls: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
