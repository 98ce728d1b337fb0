"""Keep import paths of earlier releases working, as aliases of the modules that replaced them."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find modules by their earlier names, after all other finders have failed."""

    def __init__(self, moved: Mapping[str, str]) -> None:
        self._moved = dict(moved)
        self._specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the import system's signature
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of the alias of a moved module, or None."""
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self._moved else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Import the module under its new name."""
        module = importlib.import_module(self._moved[spec.name])
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's spec, which importing the alias replaced."""
        assert module.__spec__ is not None  # noqa: S101
        module.__spec__ = self._specs[module.__spec__.name]


def keep_importable(moved: Mapping[str, str]) -> None:
    """Make each earlier name (key) importable as an alias of the current module (value)."""
    sys.meta_path.append(MovedModules(moved))
