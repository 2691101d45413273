"""Register the loader with Transformers as soon as Transformers is there, and not before.

``import hfcompress`` must stay cheap, so it cannot import Transformers in order to register.  Instead a finder on
``sys.meta_path`` waits for the one module that holds the tables of quantizers and adds our entry once it has run.
If Transformers was imported first, the entry is added at once.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLES = "transformers.quantizers.auto"


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the other finders find the module of tables, and adds a step after it has run.

    It stays on ``sys.meta_path``, so that a reloaded module of tables is registered with again.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the other finders' spec of the module of tables, None for every other module."""
        if fullname != TABLES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            _run_after(spec.loader)
        return spec


def _run_after(loader: importlib.abc.Loader) -> None:
    """Shadow ``exec_module`` on this loader, which serves this one module: its type and everything else stay."""
    run = loader.exec_module

    def run_and_register(module: ModuleType) -> None:
        run(module)
        if module.__name__ == TABLES:
            _register()

    try:
        loader.exec_module = run_and_register  # type: ignore[method-assign]
    except AttributeError:  # a loader without a dict, as frozen applications may bring
        warnings.warn(_failed(f"{type(loader).__name__} cannot be followed"), stacklevel=2)


def _register() -> None:
    """Add our entry; a fault of ours must never make ``import transformers`` fail."""
    try:
        importlib.import_module("hfcompress.loading.quantizer").register()
    except Exception as error:
        warnings.warn(_failed(f"{type(error).__name__}: {error}"), stacklevel=2)


def _failed(reason: str) -> str:
    return (
        f"hfcompress could not register its checkpoint loader, so unevenly pruned checkpoints will not load: {reason}"
    )


def register_with_transformers() -> None:
    """Register now if Transformers has its tables of quantizers, and whenever it gets them.  Calling again is free."""
    if not any(type(finder).__qualname__ == _RegisterAfterImport.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
    if TABLES in sys.modules:
        importlib.import_module(TABLES)  # waits for another thread that is still importing it
        _register()
