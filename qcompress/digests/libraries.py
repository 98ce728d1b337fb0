"""Which modules, classes and functions belong to Python or to an installed package.

They lie in one of its folders, or an installation elsewhere (``pip install --target``) recorded their package as its
own. All other modules may change unnoticed and are the user's own, also those without a file that are made by hand.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import site
import sys
import sysconfig
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PATHS = ("stdlib", "platstdlib", "purelib", "platlib")
_BY_NAME = ("qcompress", "solvers", "formulations", "torch", "numpy")
_HEAP_TYPE = 1 << 9
"""Flag of classes that are made when a program runs (``Py_TPFLAGS_HEAPTYPE``)."""


def _folders() -> tuple[str, ...]:
    schemes = itertools.product(_PATHS, sysconfig.get_scheme_names())
    found = [sysconfig.get_path(name, scheme) for name, scheme in schemes]
    found += [*site.getsitepackages(), site.getusersitepackages()]
    packages = filter(None, map(importlib.util.find_spec, _BY_NAME))
    found += [place for package in packages for place in package.submodule_search_locations or ()]
    return tuple({str(Path(folder).resolve()) + os.sep: None for folder in found})


_FOLDERS = _folders()


def is_library(value: Any) -> bool:
    """Whether a class or function belongs to Python or an installed package rather than to the user.

    A function belongs to the place of its code, as `functools.wraps` gives it another one's module. A class belongs to
    its module if it is found there; one that is made when a program runs is taken for the user's.
    """
    if isinstance(value, types.FunctionType):
        return _is_library_code(value.__code__.co_filename, value.__globals__)
    name = module_of(value)
    module = sys.modules.get(name)
    if not (name.partition(".")[0] in _BY_NAME or (module is not None and is_library_module(module, name))):
        return False
    return not isinstance(value, type) or not value.__flags__ & _HEAP_TYPE or _is_in(module, value)


def module_of(value: Any) -> str:
    """Return the name of the module that a class or function says it is from."""
    name = getattr(value, "__module__", None)
    return name if isinstance(name, str) else "builtins"


def is_own(kind: type) -> bool:
    """Whether a class is made by the user, at least in part."""
    return not all(map(is_library, kind.__mro__))


def _is_library_code(file: str, namespace: dict[str, Any]) -> bool:
    if not file.startswith("<"):
        return is_library_file(file)
    if file.startswith("<attrs generated"):  # with constants that are different in every process
        return True
    name = namespace.get("__name__")  # code made from a text, such as the methods of dataclasses
    module = sys.modules.get(name) if isinstance(name, str) else None
    return module is not None and vars(module) is namespace and is_library_module(module, module.__name__)


def _is_in(module: Any, kind: type) -> bool:
    found = module
    for name in kind.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(name)
    return found is kind


def edition_of(module: str) -> str:
    """Return the digest of the list of files of a module's package, which changes when it is installed anew.

    For Python's own modules it is Python's version, for a package without such a list the digest of the module's file.

    >>> edition_of("os") == platform.python_version(), len(edition_of("torch.nn"))
    (True, 64)
    """
    return _edition_of_package(module.partition(".")[0]) or contents_of(module)


@functools.lru_cache(maxsize=1024)
def _edition_of_package(package: str) -> str:
    if package in sys.stdlib_module_names:
        return platform.python_version()
    found = (importlib.metadata.distribution(name).read_text("RECORD") for name in _distributions_of(package))
    files = re.compile(rf"^{re.escape(package)}[/.]", re.MULTILINE)  # a project under development lists none
    listed = [text for text in found if text and files.search(text)]
    return hashlib.sha256("".join(listed).encode()).hexdigest() if listed else ""


@functools.lru_cache(maxsize=4096)
def contents_of(module: str) -> str:
    """Return the SHA-256 of the file of an imported module; empty for one without a file."""
    file = getattr(sys.modules.get(module), "__dict__", {}).get("__file__")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if isinstance(file, str) and Path(file).exists() else ""


def _distributions_of(package: str) -> list[str]:
    """Return the names of the distributions that a package is from; most have its name."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if any(Path(file).parts[0].removesuffix(".py") == package for file in importlib.metadata.files(package) or ()):
            return [package]
    return _all_packages().get(package, [])


@functools.cache
def _all_packages() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def is_library_module(module: Any, name: str) -> bool:
    """Whether a module of this name belongs to Python or an installed package rather than to the user.

    A module without a file is where its package is; a namespace package is a library's if all its folders are.
    """
    if name == "__main__" or name.partition(".")[0] in _BY_NAME:
        return name != "__main__"
    held = getattr(module, "__dict__", {})  # not asked for attributes, as it may answer to any
    if isinstance(file := held.get("__file__"), str):
        return is_library_file(file)
    if places := list(held.get("__path__", ())):
        return all(map(is_library_file, places))
    package = name.rpartition(".")[0]
    return name in sys.stdlib_module_names or (
        package in sys.modules and is_library_module(sys.modules[package], package)
    )


@functools.lru_cache(maxsize=4096)
def is_library_file(file: str) -> bool:
    """Whether a file lies in a folder of Python's or in an installed package."""
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
