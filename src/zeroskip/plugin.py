"""Make transformers know the packed format, without importing transformers.

transformers takes seconds to import, and most of this package does not need it; yet after ``import zeroskip`` its
``from_pretrained`` must load our directories. So `install` registers at once where transformers' table of quantizers is
already imported, and otherwise leaves one finder that waits for that module's import, lets the ordinary loader run it,
registers through transformers' public functions, and removes itself. Nothing of transformers is patched.
"""

from __future__ import annotations

import importlib
import importlib.abc
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install", "register"]

log = logging.getLogger(__name__)
TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Enter our quantizer in transformers' table, importing transformers if need be."""
    importlib.import_module("zeroskip.hf")


def install() -> None:
    """Register now if transformers' table is there, else when it comes."""
    if TABLE in sys.modules:
        register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        loader = spec.loader if spec is not None else None
        if loader is None:
            return spec
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = run  # type: ignore[method-assign]
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            try:
                register()
            except Exception as error:  # the import that triggered us is not ours to break
                log.warning("transformers cannot load zeroskip models: %s: %s", type(error).__name__, error)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
