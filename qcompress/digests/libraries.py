"""Which modules belong to Python or to an installed package.

They lie in one of its folders, or an installation elsewhere (``pip install --target``) recorded their package as its
own. All other modules may change unnoticed and are the user's own, also those without a file that are made by hand.
"""

import functools
import importlib.metadata
import importlib.util
import itertools
import os
import site
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

_PATHS = ("stdlib", "platstdlib", "purelib", "platlib")
_BY_NAME = ("qcompress", "solvers", "formulations", "torch", "numpy")


def _folders() -> tuple[str, ...]:
    schemes = itertools.product(_PATHS, sysconfig.get_scheme_names())
    found = [sysconfig.get_path(name, scheme) for name, scheme in schemes]
    found += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple({str(Path(folder).resolve()) + os.sep: None for folder in found})


_FOLDERS = _folders()


def is_library(value: Any) -> bool:
    """Whether a class or function belongs to Python or an installed package rather than to the user."""
    name = getattr(value, "__module__", None) or "builtins"
    return name.partition(".")[0] in _BY_NAME or (name in sys.modules and is_library_module(sys.modules[name], name))


def is_library_module(module: Any, name: str) -> bool:
    """Whether a module of this name belongs to Python or an installed package rather than to the user.

    A module without a file is where its package is; a namespace package is a library's if all its folders are.
    """
    if name == "__main__" or name.partition(".")[0] in _BY_NAME:
        return name != "__main__"
    held = getattr(module, "__dict__", {})  # not asked for attributes, as it may answer to any
    if isinstance(file := held.get("__file__"), str):
        return _is_within(file)
    if places := list(held.get("__path__", ())):
        return all(map(_is_within, places))
    package = name.rpartition(".")[0]
    return name in sys.stdlib_module_names or (
        package in sys.modules and is_library_module(sys.modules[package], package)
    )


def is_installed(package: str) -> bool:
    """Whether a package that need not be imported belongs to Python or is installed."""
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    if found is None or found.origin is None:
        return False
    return found.origin in ("built-in", "frozen") or _is_within(found.origin)


def absolute(level: int, imported: str, function: types.FunctionType) -> str:
    """Return the full name of a module that a function imports, or the name as it is if there is no such place."""
    try:
        return importlib.util.resolve_name("." * level + imported, function.__globals__.get("__package__"))
    except (ImportError, ValueError):
        return imported


@functools.lru_cache(maxsize=4096)
def _is_within(file: str) -> bool:
    path = Path(file).resolve()
    return str(path).startswith(_FOLDERS) or any(
        path.relative_to(folder).parts[0] in _recorded_in(folder) for folder in path.parents if _is_searched(folder)
    )


def _is_searched(folder: Path) -> bool:
    return any(Path(place).resolve() == folder for place in sys.path)


@functools.lru_cache(maxsize=256)
def _recorded_in(folder: Path) -> frozenset[str]:
    """Return the packages that the records of a folder's installations list; a project under development has none."""
    installed = importlib.metadata.distributions(path=[str(folder)])
    return frozenset(Path(file).parts[0] for each in installed if each.read_text("RECORD") for file in each.files or ())
