"""The registry of solvers: a table in this module, plus the solvers that other packages add as entry points.

A new back end needs one file and one line here. A separate package adds one in its ``pyproject.toml``:

    [project.entry-points."qcompress.solvers"]
    my-solver = "my_package.my_module:MySolver"
"""

import copy
import dataclasses
import importlib
import importlib.metadata
from typing import Any

from solvers.base import Solver, SolverInfo
from solvers.errors import InvalidOptionError, UnknownSolverError

ENTRY_POINTS = "qcompress.solvers"

TABLE = {
    "auto": "solvers.composites.auto:Auto",
    "brute-force": "solvers.exact.brute_force:BruteForce",
    "dp": "solvers.exact.dynamic_program:DynamicProgram",
    "milp": "solvers.exact.milp:Milp",
    "miqp": "solvers.exact.miqp:Miqp",
    "semidefinite": "solvers.exact.semidefinite:Semidefinite",
    "cp-sat": "solvers.exact.cp_sat:CpSat",
    "lagrangian": "solvers.heuristic.lagrangian:Lagrangian",
    "greedy": "solvers.heuristic.greedy:Greedy",
    "beam": "solvers.beam:Beam",
    "anneal": "solvers.heuristic.anneal:Anneal",
    "sa": "solvers.qubo.simulated_annealing:SimulatedAnnealing",
    "sqa": "solvers.qubo.path_integral:PathIntegral",
    "tabu": "solvers.qubo.tabu:Tabu",
    "steepest-descent": "solvers.qubo.steepest_descent:SteepestDescent",
    "bifurcation": "solvers.qubo.bifurcation:Bifurcation",
    "openjij": "solvers.qubo.openjij:OpenJij",
    "ga": "solvers.heuristic.genetic_algorithm:Genetic",
    "portfolio": "solvers.composites.portfolio:Portfolio",
    "leap-cqm": "solvers.leap.hybrid:LeapCqm",
    "leap-bqm": "solvers.leap.hybrid:LeapBqm",
    "leap-nl": "solvers.leap.hybrid:LeapNonlinear",
    "qpu": "solvers.leap.qpu:QuantumProcessor",
    "qpu-decomposed": "solvers.leap.decomposed:Decomposed",
}


def _table() -> dict[str, str]:
    plugins = {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    return plugins | TABLE


def names() -> list[str]:
    """Return all solver names."""
    return list(_table())


def solver_class(name: str) -> type[Solver]:
    """Return the solver class with this name.

    Raises:
        UnknownSolverError: the name is unknown; the message lists the known ones.
    """
    table = TABLE if name in TABLE else _table()  # searching for plug-ins takes 20 ms
    if name not in table:
        raise UnknownSolverError(f"no solver is called {name!r}; known: {', '.join(table)}")
    module, _, attribute = table[name].partition(":")
    solver: type[Solver] = getattr(importlib.import_module(module), attribute)
    return solver


def configured(solver: Solver, options: dict[str, Any]) -> Solver:
    """Return ``solver`` with some options replaced.

    Raises:
        InvalidOptionError: the solver has no such option; the message lists its options.
    """
    defaults = solver.option_defaults()
    if unknown := [name for name in options if name not in defaults]:
        listed = ", ".join(f"{name} (default {value!r})" for name, value in defaults.items()) or "none"
        raise InvalidOptionError(
            f"solver {solver.name!r} has no option {', '.join(map(repr, unknown))}; it has: {listed}"
        )
    return made_in(solver.made_in, dataclasses.replace(solver, **options)) if options else solver  # type: ignore[type-var]


def made_in(module: str, solver: Solver) -> Solver:
    """Return a copy of ``solver`` that names the module of its import path, whose code it depends on."""
    marked = copy.copy(solver)
    object.__setattr__(marked, "made_in", module)
    return marked


def available() -> list[SolverInfo]:
    """Describe every solver, whether it can run here, and what is missing. Uses no licence and no network.

    >>> [info.name for info in available()][:2]
    ['auto', 'brute-force']
    """
    return [solver_class(name).info() for name in _table()]
