"""Provenance of a run: the machine, the processor time, and the versions of the code."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

from solvers.base import Solver

PROJECT = "qcompress"

PARTS = frozenset({"sampler", "solver", "solvers", "children"})
"""Fields of solvers and samplers that hold others; the property ``inner`` of a solver resolves those given as texts."""


@functools.cache
def machine() -> dict[str, Any]:
    """Describe this machine: processor, number of available cores, memory, system, Python.

    >>> sorted(machine())
    ['cores', 'memory_gb', 'processor', 'python', 'system']
    """
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def processor_s() -> float:
    """Return the processor time in seconds of this process and of its ended child processes."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def versions(solver: Solver) -> dict[str, str]:
    """Return the versions of this project, of every package that ``solver`` needs, and of the package of its class.

    The module of a class that is not part of this project (a user's solver with its base classes, a dimod sampler), or
    of the import path that names it, has a digest of its file as well, or only that if it belongs to no installed
    package (a script).

    >>> from solvers.registry import solver_class
    >>> sorted(versions(solver_class("sa")()))
    ['dimod', 'dwave.samplers', 'qcompress']
    """
    kinds = [base for kind in _kinds(solver) for base in (kind.__mro__ if issubclass(kind, Solver) else [kind])]
    paths = [one.made_in for one in _inside(solver) if isinstance(one, Solver) and one.made_in]
    modules = dict.fromkeys([*(kind.__module__ for kind in kinds), *paths])
    own = {module: _code(module) for module in modules if _foreign(module)}
    return {PROJECT: version(PROJECT), **{module: version(module) for module in solver.requires}, **own}


def class_names(solver: Solver) -> list[str]:
    """Return the names of the class of ``solver`` and of the solvers and samplers inside."""
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in _kinds(solver)]


def version(module: str) -> str:
    """Return the version of the installed package that a module comes from, or a digest of its file."""
    return _package_version(module) or _digest(module) or "unknown"


@functools.cache
def _package_version(module: str) -> str:
    """Return the version of the installed package that a module comes from, or an empty string."""
    for name in dict.fromkeys((module, module.partition(".")[0])):
        try:
            return importlib.metadata.version(name.replace(".", "-"))
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


_digests: dict[str, tuple[Any, str]] = {}  # module → its specification, which is another one after a reload; digest


def _digest(module: str) -> str:
    """Return a digest of the file of an imported module, or an empty string if it has none.

    It is made once for what is loaded, since the file may change afterwards.
    """
    loaded = sys.modules.get(module)
    specification, file = getattr(loaded, "__spec__", None), getattr(loaded, "__file__", None)
    if module not in _digests or _digests[module][0] is not specification:
        content = Path(file).read_bytes() if file is not None and Path(file).exists() else None
        digest = "" if content is None else "sha256:" + hashlib.sha256(content).hexdigest()[:16]
        _digests[module] = (specification, digest)
    return _digests[module][1]


def _code(module: str) -> str:
    """Return the version of a module with a digest of its file, which may change while the version does not."""
    return " ".join(dict.fromkeys(filter(None, (version(module), _digest(module)))))


def _foreign(module: str) -> bool:
    return module.partition(".")[0] not in {"solvers", *sys.stdlib_module_names}


def _kinds(solver: Solver) -> list[type]:
    """Return the class of ``solver``, and those of the solvers and samplers inside."""
    return [one if isinstance(one, type) else type(one) for one in _inside(solver)]


def _inside(solver: Solver) -> list[Any]:
    """Return ``solver``, and the solvers and samplers inside, as instances or classes."""
    found, waiting = list[Any](), list[Any]([solver])
    while waiting:
        one = waiting.pop()
        found.append(one)
        fields = {field.name for field in dataclasses.fields(one)} if isinstance(one, Solver) else {"children"}  # type: ignore[arg-type]
        names = {"inner"} if isinstance(getattr(type(one), "inner", None), property) else fields & PARTS
        for name in names:
            inner = getattr(one, name, None) or ()
            inner = inner if isinstance(inner, list | tuple) else (inner,)
            waiting += [part for part in inner if not isinstance(part, str)]  # texts name what is installed
    return found


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):  # the system does not provide it
        return None
