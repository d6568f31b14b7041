"""Tells when the script imports a module, without importing it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(told: Mapping[str, Callable[[ModuleType], None]]) -> Callable[[], None]:
    """Call `told[name]` with a module of that name once its code has run; returns how to stop."""
    imports = _Imports(dict(told))
    sys.meta_path.insert(0, imports)
    return imports.remove


class _Imports:
    """Says when modules that are waited for were imported; stands first in sys.meta_path and finds nothing itself.

    Invariant: after `remove`, nothing of it is left in sys.meta_path, and nobody is told of what is imported.
    """

    def __init__(self, on_import: dict[str, Callable[[ModuleType], None]]) -> None:
        self._on_import = on_import

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._on_import:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                loader: Any = None if spec.loader is None else _Loader(spec.loader, self.imported)
                spec.loader = loader
                return spec
        return None

    def imported(self, module: ModuleType) -> None:
        then = self._on_import.pop(module.__name__, None)
        if then is not None:
            then(module)

    def remove(self) -> None:
        self._on_import.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader:
    """A module's own loader, which is given back to it before its code runs."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._then = then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)
