"""`cp-sat`: OR-tools' CP-SAT on the 0/1 program, in whole numbers, with exact accounting of rounding errors.

CP-SAT supports only whole numbers. Its program is therefore a relaxation of the problem, built so that its proofs are
valid:

* Uses are rounded down and limits up, so every feasible choice is feasible for the program. If CP-SAT returns a choice
  that exceeds a budget, that choice is cut off as in `solvers.exact.milp`, and the program is solved again.
* Objective numbers are rounded to the nearest. The maximum total rounding error is subtracted from CP-SAT's bound.
* A dual bound and an incumbent are computed first (`solvers.heuristic.lagrangian.begin`), and the program contains only
  the options that they leave open.

CP-SAT runs in a separate thread. The caller's thread, which can be interrupted, reports its results.
"""

import contextlib
import importlib
import queue
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from formulations import Problem
from formulations.forms.integer_program import pair_blocks
from formulations.reductions.restriction import Restriction
from solvers.base import Search
from solvers.errors import SolverError
from solvers.exact.base import Linearised, linearised_s, recovering, require_time, undecided
from solvers.kernels.moves import Floats, Integers, to_arrays

OBJECTIVE_BITS, USE_BITS = 50, 45
"""Bits of the largest objective and the largest use of any choice in CP-SAT's whole numbers, which doubles represent
exactly."""

NEGLIGIBLE = 1e-12
"""Rounding errors up to this, relative to the objective's terms, occur in `Problem.evaluate` too: proofs stay valid."""

SECONDS_PER_VARIABLE, SECONDS_PER_USE = 2e-5, 2e-6
"""Time in seconds to build the model, per option or product, and per use in a budget.

Measured with up to 400,000 options, 8 budgets or 60,000 products on a virtual machine of two cores, where other
processes run: about twice as long as it takes when they rest. The clock is looked at as well while the model is built.
"""

LOOK_S = 0.05
"""Time in seconds between two checks of the clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpSat(Linearised):
    """Constraint programming with clause learning, with pair terms linearised by RLT.

    Args:
        workers: number of threads. With one (the default), the same seed gives the same result; several threads of
            CP-SAT race each other.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> solution = solve(problem, "cp-sat")  # doctest: +SKIP
    >>> solution.objective, str(solution.status)  # doctest: +SKIP
    (1.0, 'OPTIMAL')
    """

    name: ClassVar[str] = "cp-sat"
    summary: ClassVar[str] = "constraint programming by OR-tools' CP-SAT; pair terms linearised"
    requires: ClassVar[tuple[str, ...]] = ("ortools",)
    extra: ClassVar[str] = "cp-sat"

    minima: ClassVar[Mapping[str, int]] = {"workers": 1}
    workers: int = 1

    def prepare(self) -> None:
        """Compile the inner loops, and import OR-tools, which takes a second."""
        Linearised.prepare(self)
        importlib.import_module("ortools.sat.python.cp_model")

    def run(self, problem: Problem, search: Search) -> None:
        """Compute a bound and an incumbent, then run CP-SAT on the options that they leave open."""
        part = undecided(problem, search)
        if part is None:
            return
        search.details["workers"] = self.workers
        with recovering(search):
            self._search(part, problem, search)

    def _search(self, part: Restriction, problem: Problem, search: Search) -> None:
        """Run CP-SAT on the open part."""
        require_time(search, linearised_s(part.problem, SECONDS_PER_VARIABLE, SECONDS_PER_USE))
        with search.phase("build_s"):
            program = _Program(part.problem, None if search.choice is None else part.lower(search.choice), search)
        search.note(rounding_error=program.error)
        seed = int(search.rng.integers(2**31))
        while not search.expired():
            last = status = None
            course = program.solved(search, seed, self.workers)
            with search.phase("solve_s"), contextlib.closing(course):
                for kind, news in course:
                    if kind == "choice":
                        last = news
                        search.offer(part.lift(news))
                    elif kind == "bound":
                        lower = program.bound(news)
                        search.raise_bound(lower if search.objective is None else min(lower, search.objective))
                    else:
                        status = news
            if status == "INFEASIBLE":
                search.close()
            if status in ("FEASIBLE", "UNKNOWN"):
                search.cut_short()
            if status != "OPTIMAL" or last is None:
                return
            broken = part.problem.evaluate(last).violations or problem.evaluate(part.lift(last)).violations
            if not broken:
                if program.error <= NEGLIGIBLE * program.size:
                    search.close()
                return
            search.details["cuts"] = search.details.get("cuts", 0) + 1
            program.cut_off(last, next(iter(broken)))


class _Program:
    """The CP-SAT model of a problem, with ``objective = shift + scaled_objective / scale`` to within ``error``."""

    def __init__(self, problem: Problem, start: Integers | None, search: Search) -> None:
        from ortools.sat.python import cp_model

        self.problem, self.model, self.start = problem, cp_model.CpModel(), start
        self.first, self._search = problem.group_offsets, search
        self.x: list[Any] = []
        self.y: list[tuple[Any, int, int]] = []
        for size in np.diff(self.first).tolist():
            require_time(search)
            members = [self.model.new_bool_var("") for _ in range(size)]
            self.model.add_exactly_one(members)
            self.x += members
        self._add_budgets()
        self._set_objective()
        self._hint()

    def _add_budgets(self) -> None:
        a, weighted = to_arrays(self.problem), _weighted_sum()
        for use, limit in zip(a.use.T, a.limit.tolist(), strict=True):
            most = float(np.maximum.reduceat(use, self.first[:-1]).sum())
            if most <= limit:
                continue
            require_time(self._search)
            integral = most < 2.0**53 and bool((use == np.floor(use)).all())
            scale = 1.0 if integral else 2.0 ** (USE_BITS - np.ceil(np.log2(most)))
            room = 0.0 if integral else self.problem.num_groups * 2.0**-52 * limit  # rounding error of the sum of uses
            uses = np.floor(use * scale).astype(np.int64).tolist()
            self.model.add(weighted(self.x, uses) <= int(np.ceil((limit + room) * scale) if not integral else limit))

    def _set_objective(self) -> None:
        problem = self.problem
        least = np.minimum.reduceat(problem.cost, self.first[:-1])
        self.shift = problem.offset + float(least.sum())
        above = problem.cost - least[problem.group_of]
        blocks = []
        for block in pair_blocks(problem):
            require_time(self._search)
            blocks.append(block)
        largest = np.maximum.reduceat(above, self.first[:-1]).sum()
        largest += sum(float(np.abs(weight).max()) for _, _, weight in blocks)
        self.size = float(np.abs(problem.cost).max() + largest)
        self.scale = 2.0 ** (OBJECTIVE_BITS - np.ceil(np.log2(largest))) if largest > 0 else 1.0
        costs, error = _rounded(above * self.scale)
        self.error = float(np.maximum.reduceat(error, self.first[:-1]).sum())
        variables, coefficients = list(self.x), costs.tolist()
        for options, beside, weight in blocks:
            rounded, rounding = _rounded(weight * self.scale)
            self.error += float(rounding.max())
            require_time(self._search)
            y = self._products(options, beside)
            variables += y
            coefficients += rounded.ravel().tolist()
        self.error /= self.scale
        self.model.minimize(_weighted_sum()(variables, coefficients))

    def _products(self, above: Integers, beside: Integers) -> list[Any]:
        """Add variables for the products of two groups' options, row by row, and the constraints that link them."""
        model, x, problem = self.model, self.x, self.problem
        y = [[model.new_bool_var("") for _ in beside] for _ in above]
        sizes = np.diff(self.first)
        sides = ((above, y, beside), (beside, list(zip(*y, strict=True)), above))
        partial = []
        for options, lines, opposite in sides:
            complete = len(opposite) == sizes[problem.group_of[opposite[0]]]
            partial.append(not complete)
            for option, line in zip(options.tolist(), lines, strict=True):
                model.add(sum(line) == x[option] if complete else sum(line) <= x[option])
        if all(partial):
            flat = [variable for line in y for variable in line]
            chosen = [x[option] for option in (*above.tolist(), *beside.tolist())]
            model.add(sum(flat) >= sum(chosen) - 1)
        self.y += [(y[i][j], int(u), int(v)) for i, u in enumerate(above) for j, v in enumerate(beside)]
        return [variable for line in y for variable in line]

    def _hint(self) -> None:
        if self.start is None:
            return
        chosen = np.zeros(len(self.x), dtype=bool)
        chosen[self.first[:-1] + self.start] = True
        for variable, value in zip(self.x, chosen.tolist(), strict=True):
            require_time(self._search)
            self.model.add_hint(variable, value)
        for variable, u, v in self.y:
            require_time(self._search)
            self.model.add_hint(variable, bool(chosen[u] and chosen[v]))

    def bound(self, scaled_bound: float) -> float:
        """Convert a lower bound on the whole-number objective to one on the problem."""
        return self.shift + scaled_bound / self.scale - self.error

    def cut_off(self, choice: Integers, budget: str) -> None:
        """Forbid a choice that exceeds a budget, and every choice in which all groups use at least as much."""
        use = self.problem.resources[budget]
        as_much = np.flatnonzero(use >= use[self.problem.flat(choice)][self.problem.group_of])
        self.model.add(sum(self.x[v] for v in as_much) <= self.problem.num_groups - 1)

    def solved(self, search: Search, seed: int, workers: int) -> Generator[tuple[str, Any]]:
        """Solve, and yield ``("choice", …)`` and ``("bound", …)`` when found, and ``("status", name)`` at the end."""
        from ortools.sat.python import cp_model

        news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        x, first = self.x, self.first

        class Choices(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]
            def on_solution_callback(self) -> None:
                values = np.array([self.boolean_value(variable) for variable in x])
                news.put(("choice", np.flatnonzero(values) - first[:-1]))

        solver = cp_model.CpSolver()
        solver.best_bound_callback = lambda bound: news.put(("bound", bound))
        solver.parameters.num_workers = workers
        solver.parameters.random_seed = seed
        solver.parameters.linearization_level = 2  # without all RLT rows in its LP the bound hardly improves
        solver.parameters.catch_sigint_signal = False  # the caller's thread is interrupted and stops this thread
        solver.parameters.relative_gap_limit = solver.parameters.absolute_gap_limit = 0.0
        if np.isfinite(search.remaining()):
            solver.parameters.max_time_in_seconds = max(search.remaining(), 0.01)

        def run() -> None:
            try:
                status = solver.solve(self.model, Choices())
                if status == cp_model.MODEL_INVALID:
                    raise SolverError(f"CP-SAT refuses the model: {self.model.validate()}")
                if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):  # otherwise the bound may be a meaningless 0
                    news.put(("bound", solver.best_objective_bound))
                news.put(("status", status.name))
            except BaseException as error:  # passed to the caller's thread
                news.put(("error", error))

        thread = threading.Thread(target=run, name="cp-sat", daemon=True)
        thread.start()
        try:
            while True:
                try:
                    kind, value = news.get(timeout=LOOK_S)
                except queue.Empty:
                    if search.expired() or search.proven():
                        solver.stop_search()
                    continue
                if kind == "error":
                    raise value
                yield kind, value
                if kind == "status":
                    return
        finally:
            while thread.is_alive():
                solver.stop_search()  # repeated: a stop before the search starts is lost
                thread.join(LOOK_S)


def _rounded(values: Floats) -> tuple[Integers, Floats]:
    rounded = np.rint(values)
    return rounded.astype(np.int64), np.abs(values - rounded)


def _weighted_sum() -> Any:
    from ortools.sat.python import cp_model

    return cp_model.LinearExpr.weighted_sum
