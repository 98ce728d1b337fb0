"""The check of runs that are cut short, with a clock that the suite controls, so that no result depends on the machine.

A run on a problem whose optimum is known is cut at its first, third, tenth … look at the clock. Whatever it claims then
must be true.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from formulations import Problem
from solvers.base import Solver
from solvers.run import conduct
from solvers.solution import Solution
from solvers.stated_search import StatedSearch
from solvers.testing.judge import ConformanceError, judge_claims
from solvers.testing.problems import known_problems, taken

LOOKS = (1, 3, 10, 30, 100, 300)
TIME_LIMIT_S = 0.05  # by the suite's clock, and for external engines that have clocks of their own
SEED = 11


@dataclass
class Countdown:
    """A clock that reaches ``TIME_LIMIT_S`` when it is looked at for the ``looks``-th time after its start."""

    looks: int
    seen: int = field(default=-1, init=False)

    def __call__(self) -> float:
        """Return the time in seconds."""
        self.seen += 1
        return TIME_LIMIT_S * self.seen / self.looks


def cut_run(problem: Problem, solver: Solver, looks: int) -> Solution:
    """Run the solver without presolve until its ``looks``-th look at the clock, when its time is over."""
    clock: Callable[[], float] = Countdown(looks)
    search = StatedSearch(problem, solver=solver.name, time_limit=TIME_LIMIT_S, seed=SEED, clock=clock)
    return conduct(search, solver, presolve=False)


def check_cut_runs_claim_nothing_false(solver: Solver) -> None:
    """Check status, bounds and objective against the optimum when the time is over at the first to 300th look at it."""
    solver.prepare()
    for problem in taken(solver, known_problems(solver.native_pairs)):
        for looks in LOOKS:
            try:
                judge_claims(solver, problem, cut_run(problem, solver, looks))
            except ConformanceError as error:
                raise ConformanceError(f"{error} when its time was over at look {looks} at the clock") from error
