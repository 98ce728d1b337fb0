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

    For a module that belongs to no installed package (a script), a digest of its file replaces the version.

    >>> from solvers.registry import solver_class
    >>> sorted(versions(solver_class("sa")()))
    ['dimod', 'dwave.samplers', 'qcompress']
    """
    modules = [*solver.requires, *(kind.__module__ for kind in _kinds(solver))]
    foreign = {module: version(module) for module in modules if module.partition(".")[0] != "solvers"}
    return {PROJECT: version(PROJECT), **foreign}


def class_names(solver: Solver) -> list[str]:
    """Return the names of the class of ``solver`` and of its dimod sampler, if any, with the samplers inside."""
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in _kinds(solver)]


@functools.cache
def version(module: str) -> str:
    """Return the version of the installed package that a module comes from, or a digest of its file."""
    for name in dict.fromkeys((module, module.partition(".")[0])):
        try:
            return importlib.metadata.version(name.replace(".", "-"))
        except importlib.metadata.PackageNotFoundError:
            continue
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not Path(file).exists():
        return "unknown"
    return "sha256:" + hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _kinds(solver: Solver) -> list[type]:
    kinds: list[type] = [type(solver)]
    waiting = [getattr(solver, field.name) for field in dataclasses.fields(solver) if field.name == "sampler"]  # type: ignore[arg-type]
    while waiting:
        sampler = waiting.pop()
        kinds.append(type(sampler))
        waiting += getattr(sampler, "children", None) or []
    return kinds


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
