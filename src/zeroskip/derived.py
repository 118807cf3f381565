"""Give a module a class that derives from its own, so that it stays an instance of that, and of the same name.

A mixin's forward does the usual quickly and hands the unusual to `super()`, which is the module's own class.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

__all__ = ["derive", "restore"]

ORIGIN = "zeroskip_origin"


def derive(module: nn.Module, mixin: type) -> None:
    """Put `mixin` before the class of a module."""
    kind: Any = type(module)
    module.__class__ = _derived(kind, mixin)


def restore(module: nn.Module) -> None:
    """Give a module the class back that it had before `derive`."""
    module.__class__ = getattr(type(module), ORIGIN)


@cache
def _derived(kind: Any, mixin: Any) -> Any:
    class Derived(mixin, kind):  # type: ignore[misc]
        def __reduce_ex__(self, protocol: Any) -> Any:
            return _blank, (kind, mixin), self.__dict__

    Derived.__name__, Derived.__qualname__, Derived.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    setattr(Derived, ORIGIN, kind)
    return Derived


def _blank(kind: Any, mixin: Any) -> Any:
    made = _derived(kind, mixin)
    return made.__new__(made)
