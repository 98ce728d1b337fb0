"""Compute the smallest use of a resource under other budgets, and the smallest factor by which budgets must grow.

Both are small exact programs over the uses alone, solved with ``scipy.optimize`` (HiGHS). The dual prices of the linear
relaxation give a lower bound and the reduced cost of each option. The integer program is solved over the options with
the smallest reduced costs, the core, which grows until no option outside it can be better (Balas & Zemel,
doi:10.1287/opre.28.5.1130). Returned choices meet the budgets as `Problem.evaluate` computes them. Lower values are
proven, by the prices, the options outside the core, and HiGHS's bound minus its tolerance.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse

from formulations.pairs import PairTerms
from formulations.problem import Problem, limit_of
from formulations.reductions.dominance import Floats, Integers, drop_dominated

TOLERANCE = 2e-6
"""Absolute tolerance of HiGHS; uses are scaled by their mean spread in a group before they are passed to it."""

SHARE = 0.25
"""Fraction of the remaining time that one program may take; nearly all finish long before."""

CORE, PRESOLVED = 200, 5000
"""Number of options in the first core beyond one per group; number of columns up to which HiGHS presolves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Least:
    """A minimum: a proven lower bound, and a choice with its value (``upper``) or the proof that none exists."""

    lower: float = -np.inf
    upper: float | None = None
    choice: Integers | None = None
    impossible: bool = False


class UsePrograms:
    """Integer programs over the uses of a problem, shifted by each group's smallest use, scaled by the mean spread."""

    def __init__(self, problem: Problem, deadline: float) -> None:
        self.problem, self.deadline = problem, deadline
        keep = np.ones(problem.num_options, dtype=bool)
        uses = {name: problem.resources[name] for name in problem.budgets}
        total = sum((use / (use.max() or 1.0) for use in uses.values()), np.zeros(problem.num_options))
        linear = problem.derived(cost=total, pairs=PairTerms())
        drop_dominated(linear, keep, np.arange(problem.num_options), list(uses))
        self.options = np.flatnonzero(keep)
        self.group_of = problem.group_of[self.options]
        self.starts = np.searchsorted(self.group_of, np.arange(problem.num_groups))
        self.base: dict[str, float] = {}
        self.unit: dict[str, float] = {}
        self.use: dict[str, Floats] = {}
        self.whole: dict[str, bool] = {}
        for name, use in uses.items():
            least = np.minimum.reduceat(use, problem.group_offsets[:-1])
            above = use[self.options] - least[self.group_of]
            self.base[name] = problem.minimum_usage()[name]
            self.whole[name] = bool((np.append(use, problem.fixed.get(name, 0.0)) % 1 == 0).all())
            self.unit[name] = float(above[above > 0].mean()) if above.any() else 1.0
            self.use[name] = above / self.unit[name]

    def least(self, name: str, hold: Sequence[str]) -> Least:
        """Minimise the use of one resource over the choices that meet the budgets ``hold``."""
        if not self._possible(hold):
            return Least(impossible=True)
        if not hold:
            return Least(lower=self.base[name], upper=self.base[name])
        least = self._solve(self.use[name], hold, [])
        lower = max(self.base[name], self.base[name] + self.unit[name] * least.lower)
        if self.whole[name]:
            lower = float(np.ceil(lower))
        if least.choice is None:
            return Least(lower=lower, impossible=least.impossible)
        upper = self._usage(least.choice, name)
        return Least(lower=min(upper, lower), upper=upper, choice=least.choice)

    def factor(self, grow: Sequence[str], hold: Sequence[str]) -> Least:
        """Find the smallest factor for the budgets ``grow`` with which a choice meets them and the budgets ``hold``."""
        if not self._possible(hold):
            return Least(impossible=True)
        least = self._solve(np.zeros(len(self.options)), hold, grow)
        if least.choice is None:
            return least
        upper = max(self._usage(least.choice, name) / self.problem.budgets[name] for name in grow)
        return Least(lower=min(upper, least.lower), upper=upper, choice=least.choice)

    def _possible(self, hold: Sequence[str]) -> bool:
        return all(self.base[name] <= limit_of(self.problem.budgets[name]) for name in hold)

    def _usage(self, chosen: Integers, name: str) -> float:
        return self.problem.usage(chosen)[name]

    def _broken(self, chosen: Integers, hold: Sequence[str]) -> list[str]:
        return [name for name in hold if self._usage(chosen, name) > limit_of(self.problem.budgets[name])]

    def _solve(self, target: Floats, hold: Sequence[str], grow: Sequence[str]) -> Least:
        """Minimise ``target·x``, or with ``grow`` the factor t, which is then the last column."""
        if len(self.options) == self.problem.num_groups:  # nothing to choose
            meets = not self._broken(self.options, hold)
            return Least(lower=np.inf, choice=self.options) if meets else Least(impossible=True)
        core = _Core(self, target, hold, grow)
        end = time.perf_counter() + SHARE * max(0.0, self.deadline - time.perf_counter())
        if not core.price(end - time.perf_counter()):
            return Least(impossible=core.impossible)
        while (seconds := end - time.perf_counter()) > 0:
            choice = core.solve(seconds)
            if core.impossible:
                return Least(impossible=True)
            if choice is None:
                if core.everything:
                    break
                core.grow()
                continue
            chosen = self.options[choice]
            if broken := self._broken(chosen, hold):  # they hold only within the solver's tolerance
                core.forbid(broken[0], choice)
            elif core.everything or core.value <= core.outside:
                return Least(lower=core.lower, choice=chosen)
            else:
                core.grow()
        return Least(lower=core.lower)


class _Core:
    """One program ``min target·x, A·x - last·t ≤ b`` with one option per group, over a growing core of options."""

    def __init__(self, programs: UsePrograms, target: Floats, hold: Sequence[str], grow: Sequence[str]) -> None:
        budgets, base, unit, use = programs.problem.budgets, programs.base, programs.unit, programs.use
        self.programs, self.target, self.num_hold = programs, target, len(hold)
        self.group_of, self.starts = programs.group_of, programs.starts
        rows = [use[name] for name in hold] + [use[name] * (unit[name] / budgets[name]) for name in grow]
        self.rows = np.array(rows)
        held = [(limit_of(budgets[name]) - base[name]) / unit[name] for name in hold]
        self.limits = np.array(held + [-base[name] / budgets[name] for name in grow])
        self.last = np.array([0.0] * len(hold) + [1.0] * len(grow))
        self.size, self.lower, self.outside, self.value = CORE, -np.inf, -np.inf, np.inf
        self.impossible = self.everything = False

    def price(self, seconds: float) -> bool:
        """Solve the linear relaxation; False when time ran out or it is infeasible (then ``impossible`` is set)."""
        if seconds <= 0:
            return False
        size, groups = len(self.target), len(self.starts)
        membership = scipy.sparse.csr_array((np.ones(size), (self.group_of, np.arange(size))), shape=(groups, size))
        free = int(self.last.any())
        solved = scipy.optimize.linprog(
            np.append(self.target, [1.0] * free),
            A_ub=scipy.sparse.csr_array(np.hstack([self.rows, -self.last[:, None]][: 1 + free])),
            b_ub=self.limits,
            A_eq=scipy.sparse.hstack([membership, scipy.sparse.csr_array((groups, free))], format="csr")
            if free
            else membership,
            b_eq=np.ones(groups),
            method="highs",
            options={"time_limit": seconds},
        )
        self.impossible = solved.status == 2
        if solved.status != 0:
            return False
        prices = np.maximum(0.0, -solved.ineqlin.marginals)
        if free:
            total = prices[self.num_hold :].sum()  # any prices that sum to 1 give a bound: t then costs nothing
            prices = prices / total if total > 0 else self.last / self.last.sum()
        cost = self.target + prices @ self.rows
        least = np.minimum.reduceat(cost, self.starts)
        self.reduced = cost - least[self.group_of]
        rounding = 1e-9 * float(np.abs(least).sum() + prices @ np.abs(self.limits))
        self.bound = self.lower = float(least.sum() - prices @ self.limits) - rounding
        return True

    def grow(self) -> None:
        """Enlarge the core."""
        self.size *= 8

    def forbid(self, name: str, options: Integers) -> None:
        """Forbid choices in which every group uses at least as much of a resource as with these ``options``."""
        use = self.programs.use[name]
        self.rows = np.vstack([self.rows, use >= use[options][self.group_of]])
        self.limits, self.last = np.append(self.limits, len(self.starts) - 1.0), np.append(self.last, 0.0)

    def solve(self, seconds: float) -> Integers | None:
        """Return the best choice of the core as positions in the options, or None; this also raises ``lower``."""
        extra = np.sort(self.reduced)[len(self.starts) :]
        self.everything = self.size >= len(extra)
        threshold = np.inf if self.everything else extra[self.size]
        inside = np.flatnonzero(self.reduced < threshold)
        several = np.bincount(self.group_of[inside]) > 1
        open_ones = inside[several[self.group_of[inside]]]
        fixed = inside[~several[self.group_of[inside]]]
        groups, group_of = np.unique(self.group_of[open_ones], return_inverse=True)
        size, free = len(open_ones), int(self.last.any())
        membership = np.ones(size), (group_of, np.arange(size))
        result = scipy.optimize.milp(
            np.append(self.target[open_ones], [1.0] * free),
            integrality=np.append(np.ones(size), [0.0] * free),
            bounds=scipy.optimize.Bounds(0.0, np.append(np.ones(size), [np.inf] * free)),
            constraints=[
                scipy.optimize.LinearConstraint(
                    scipy.sparse.csr_array(membership, shape=(len(groups), size + free)), 1.0, 1.0
                ),
                scipy.optimize.LinearConstraint(
                    np.hstack([self.rows[:, open_ones], -self.last[:, None]][: 1 + free]),
                    -np.inf,
                    self.limits - self.rows[:, fixed].sum(axis=1),
                ),
            ],
            options={"time_limit": seconds, "mip_rel_gap": 0.0, "presolve": size <= PRESOLVED},
        )
        self.outside = self.bound + threshold
        if result.status == 2:
            self.impossible = self.everything
            self.lower = max(self.lower, self.outside)  # infinite when nothing is outside
            return None
        constant = float(self.target[fixed].sum())
        if result.mip_dual_bound is not None:
            self.lower = max(self.lower, min(self.outside, constant + float(result.mip_dual_bound) - TOLERANCE))
        if result.x is None:
            self.everything = True  # time was up
            return None
        self.value = constant + float(result.fun)
        choice = np.empty(len(self.starts), dtype=np.int64)
        choice[self.group_of[fixed]] = fixed
        order = np.lexsort((-result.x[:size], group_of))
        choice[groups] = open_ones[order[np.searchsorted(group_of, np.arange(len(groups)))]]
        return choice
