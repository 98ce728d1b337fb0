"""`miqp`: SCIP on the convex mixed-integer quadratic program, stated relative to the dual bound.

With the multipliers of a dual bound L (`solvers.bounds.duality`), every feasible choice x satisfies

    objective = L + Σ reduced_v·x_v + Σ_k λ_k·slack_k + ½‖Fᵀx - y‖² + Σ_blocks R_uv·x_u·x_v

and each term is at least 0. With an incumbent U, an option or product whose term reaches U - L is therefore left out,
the rest is divided by U - L, and SCIP only has to search below 1. The factor becomes r constraints ``t_i ≥ w_i²`` on
linear expressions w, which are convex for every problem. Products of sparse blocks are linearised as in
`formulations.forms.integer_program`.
"""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from formulations import Problem
from formulations.reductions.restriction import Restriction
from solvers.base import Search
from solvers.bounds.dual import DualBound
from solvers.bounds.duality import dual_bound
from solvers.bounds.messages import SparseBlocks
from solvers.bounds.semidefinite import convexified, useful_within
from solvers.exact.base import Exact, recovering, require_time, undecided
from solvers.kernels.moves import Arrays, Floats, Integers, to_arrays

MAX_PRODUCTS = 200_000
"""Maximum number of entries in sparse blocks."""

SECONDS_PER_OPTION, SECONDS_PER_TERM = 3e-5, 5e-6
"""Time in seconds to build the model, per open option or sparse pair term, and per term of an open option in a budget
or a square.

Measured with up to 400,000 options and 8 budgets on a virtual machine of two cores, where other processes run: about
twice as long as it takes when they rest. The clock is looked at as well while the model is built.
"""

TOLERANCE = 1e-7
"""Feasibility tolerance of SCIP: the allowed violation of ``t_i ≥ w_i²``, in units of U - L.

SCIP solves doubtful linear programs again at a thousandth of this tolerance, and its simplex solver prints a warning
for each tolerance below 1e-10.
"""

DUAL_SHARE = 0.4
"""Maximum fraction of the remaining time for the dual bound of the stated problem."""

CONVEXIFY_SHARE = 0.1
"""Maximum fraction of the remaining time for tightening the relaxation."""

FULL_RANK = 1 / 3
"""Number of columns per option from which a factor is replaced by the one with the tightest relaxation."""

COMPLETE = ("optimal", "infeasible", "inforunbd")
"""Values of SCIP's status if its search is complete (no variable is unbounded below)."""

PROVING = (*COMPLETE, "timelimit", "userinterrupt")
"""Values of SCIP's status if its bound is proven."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Miqp(Exact):
    """Convex mixed-integer quadratic programming with pair terms in factor form.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> str(solve(layered_problem(10, seed=1), "miqp").status)  # doctest: +SKIP
    'OPTIMAL'
    """

    name: ClassVar[str] = "miqp"
    summary: ClassVar[str] = "convex mixed-integer quadratic programming by SCIP; pair terms stay in factor form"
    requires: ClassVar[tuple[str, ...]] = ("pyscipopt",)
    extra: ClassVar[str] = "exact"

    def refuse(self, problem: Problem) -> str:
        """Refuse a problem with too many sparse terms."""
        if problem.pairs.num_sparse <= MAX_PRODUCTS:
            return ""
        return (
            f"solver 'miqp' takes up to {MAX_PRODUCTS:,} sparse pair terms, this problem has "
            f"{problem.pairs.num_sparse:,}; use 'auto', 'lagrangian' or 'anneal'"
        )

    def run(self, problem: Problem, search: Search) -> None:
        """Compute a bound and an incumbent, then run SCIP on the options that they leave open."""
        part = undecided(problem, search)
        if part is None:
            return
        with search.phase("build_s"):
            stated = _stated(part.problem, search)
            bound = dual_bound(stated, time_limit=DUAL_SHARE * search.remaining())
            if search.objective is not None:
                search.raise_bound(min(bound.value, search.objective))
                if bound.value >= search.objective:  # nothing is left to search, even where units round the bound down
                    search.close()
                if search.proven():
                    return
        with recovering(search):
            self._search(part, stated, bound, search)

    def _search(self, part: Restriction, stated: Problem, bound: DualBound, search: Search) -> None:
        """Run SCIP on what the bound and the incumbent leave open."""
        size = 1.0 if search.objective is None else search.objective - bound.value
        with search.phase("build_s"):
            program = _Program(stated, bound, size, search)
        model = program.model
        model.hideOutput()
        model.setParams(
            {
                "limits/gap": 0.0,
                "limits/absgap": 0.0,
                "numerics/feastol": TOLERANCE,
                "numerics/dualfeastol": TOLERANCE,
                "randomization/randomseedshift": 0,
            }
        )
        if np.isfinite(search.remaining()):
            model.setParam("limits/time", search.remaining())
        while not search.expired():
            with search.phase("solve_s"):
                model.optimize()
            choice = program.decode() if model.getNSols() else None
            if choice is not None:
                search.offer(part.lift(choice))
            status, lower = model.getStatus(), model.getDualbound()
            if status in PROVING and abs(lower) < model.infinity():
                lower = bound.value + size * (min(lower, 1.0) - TOLERANCE * len(bound.direction))
                search.raise_bound(lower if search.objective is None else min(lower, search.objective))
            if status == "userinterrupt":
                raise KeyboardInterrupt
            broken = {} if choice is None else stated.evaluate(choice).violations
            if choice is None or not broken:
                if status in COMPLETE:
                    search.close()
                else:
                    search.cut_short()
                break
            program.cut_off(stated, choice, next(iter(broken)))
            if np.isfinite(search.remaining()):
                model.setParam("limits/time", search.remaining())
        search.details["nodes"] = model.getNNodes()


def _stated(problem: Problem, search: Search) -> Problem:
    """Return ``problem`` or an equivalent one with a tighter relaxation.

    A factor with few columns is kept: SCIP gets one square per column, and a tighter factor has almost V columns.
    """
    few = problem.pairs.rank < FULL_RANK * problem.num_options or problem.pairs.num_sparse
    seconds = CONVEXIFY_SHARE * search.remaining()
    if few or not useful_within(seconds, problem.num_options):
        return problem
    return convexified(problem, time_limit=seconds)


class _Program:
    """The SCIP model of a problem, with a method to read a choice from it."""

    def __init__(self, problem: Problem, bound: DualBound, size: float, search: Search) -> None:
        import pyscipopt

        self.model, self.sum, self._search = pyscipopt.Model(), pyscipopt.quicksum, search
        bounded = search.objective is not None
        a = to_arrays(problem)
        self.starts, self.base = a.starts, a.starts[:-1] + bound.choice
        cutoff = size if bounded else np.inf
        is_open = bound.reduced < cutoff
        is_open[self.base] = True
        several = np.bincount(a.group_of[is_open], minlength=len(self.base)) > 1
        self.options = np.flatnonzero(is_open & several[a.group_of])
        fixed = self.base[~several]
        seconds = SECONDS_PER_OPTION + SECONDS_PER_TERM * (len(a.limit) + len(bound.direction))
        require_time(search, len(self.options) * seconds + problem.pairs.num_sparse * SECONDS_PER_OPTION)
        self.x: dict[int, Any] = {}
        for _, members in itertools.groupby(self.options.tolist(), key=a.group_of.tolist().__getitem__):
            require_time(search)
            group = {v: self.model.addVar(vtype="B") for v in members}
            self.model.addCons(self.sum(group.values()) == 1)
            self.x |= group
        objective = self._terms(bound.reduced / size)
        objective += self._slacks(problem, a, bound, fixed, size)
        objective += self._squares(a.factor, bound.direction, fixed, size)
        if len(bound.messages):
            objective += self._blocks(problem, bound, is_open, cutoff, size)
        self.model.setObjective(self.sum(objective), "minimize")
        if bounded:
            self.model.setObjlimit(1.0)

    def _terms(self, weights: Floats) -> list[Any]:
        """Return a term for every option with a variable, with the weights of all options ``(V,)``."""
        return [weight * x for weight, x in zip(weights[self.options].tolist(), self.x.values(), strict=True)]

    def _slacks(self, problem: Problem, a: Arrays, bound: DualBound, fixed: Integers, size: float) -> list[Any]:
        room, terms = a.limit - a.use[fixed].sum(axis=0), []
        for k, name in enumerate(problem.budgets):
            require_time(self._search)
            unit = a.unit[k]
            slack = self.model.addVar(lb=0.0)
            used = self.sum(self._terms(a.use[:, k] / unit))
            self.model.addCons(used + slack == room[k] / unit)
            terms.append((bound.prices[name] * unit / size) * slack)
        return terms

    def _squares(self, factor: Floats, direction: Floats, fixed: Integers, size: float) -> list[Any]:
        root = np.sqrt(size)
        offset, scaled = (factor[fixed].sum(axis=0) - direction) / root, factor / root
        terms = []
        for i in range(len(direction)):
            require_time(self._search)
            w, t = self.model.addVar(lb=None), self.model.addVar(lb=0.0)
            self.model.addCons(w == offset[i] + self.sum(self._terms(scaled[:, i])))
            self.model.addCons(t >= w * w)
            terms.append(0.5 * t)
        return terms

    def _blocks(self, problem: Problem, bound: DualBound, is_open: Any, cutoff: float, size: float) -> list[Any]:
        blocks, terms = SparseBlocks.of(problem), []
        for rows, columns, weights, a, b in blocks.each(bound.messages):
            require_time(self._search)
            rest = weights - a[:, None] - b[None, :]
            rest -= rest.min()
            i, j = np.flatnonzero(is_open[rows]), np.flatnonzero(is_open[columns])
            rest, rows, columns = rest[np.ix_(i, j)], rows[i], columns[j]
            y = {
                (u, v): self.model.addVar(lb=0.0)
                for u in range(len(rows))
                for v in range(len(columns))
                if rest[u, v] < cutoff
            }
            for u, option in enumerate(rows.tolist()):
                self.model.addCons(self.sum(y[pair] for pair in y if pair[0] == u) == self.x.get(option, 1.0))
            for v, option in enumerate(columns.tolist()):
                self.model.addCons(self.sum(y[pair] for pair in y if pair[1] == v) == self.x.get(option, 1.0))
            terms += [(rest[pair] / size) * variable for pair, variable in y.items() if rest[pair] > 0]
        return terms

    def decode(self) -> Integers:
        """Return the choice ``(G,)`` of SCIP's best solution."""
        chosen, solution = self.base.copy(), self.model.getBestSol()
        for v, x in self.x.items():
            if self.model.getSolVal(solution, x) > 0.5:
                chosen[np.searchsorted(self.starts, v, side="right") - 1] = v
        return chosen - self.starts[:-1]

    def cut_off(self, problem: Problem, choice: Integers, resource: str) -> None:
        """Forbid a choice that exceeds a budget, and every choice in which all groups use at least as much."""
        use, chosen = problem.resources[resource], problem.flat(choice)
        self.model.freeTransform()
        as_much = [x for v, x in self.x.items() if use[v] >= use[chosen[problem.group_of[v]]]]
        open_groups = len({int(problem.group_of[v]) for v in self.x})
        self.model.addCons(self.sum(as_much) <= open_groups - 1)
