"""Stand between a module and its callers for a while, without a hook or an attribute that could stay behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

Around = Callable[..., Any]
"""Called in place of a module's forward, with that forward and its arguments: `around(forward, *args, **kwargs)`."""


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


def _with_forward(cls: type[nn.Module], around: Around) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(partial(cls.forward, self), *args, **kwargs)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
