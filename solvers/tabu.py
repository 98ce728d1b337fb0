"""Tabu search on the QUBO (dwave-samplers); samples are decoded, repaired and polished.

What always holds: a read ends after a number of restarts, so that a seed gives the same answer again, unless the
time limit cuts it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from formulations import Problem
from formulations.bqm import EncodedBqm
from solvers.base import Search, Solver
from solvers.errors import InvalidOptionError
from solvers.qubo import sample_rounds
from solvers.warm import warm


@dataclass(frozen=True)
class Tabu(Solver):
    """Multi-start tabu search on the QUBO.

    Attributes:
        num_reads: samples a round.
        num_restarts: restarts of each read.
        rounds: samplings, each with better prices of the budgets.
        encoding: of `formulations.to_bqm`.

    >>> from solvers import solve
    >>> from formulations.instances import layered_problem
    >>> solve(layered_problem(5), "tabu", seed=0, rounds=2).feasible
    True
    """

    name: ClassVar[str] = "tabu"
    summary: ClassVar[str] = "tabu search on the QUBO (dwave-samplers); decoded, repaired, polished"
    native_constraints: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ("dimod", "dwave.samplers")
    num_reads: int = 2
    num_restarts: int = 2
    rounds: int = 8
    encoding: str = "domain-wall"

    def __post_init__(self) -> None:
        for option, least in (("num_reads", 1), ("num_restarts", 0), ("rounds", 1)):
            if (found := getattr(self, option)) < least:
                raise InvalidOptionError(f"option {option!r} of 'tabu' must be at least {least}, found {found}")

    def prepare(self) -> None:
        """Compile the loops."""
        warm()

    def run(self, problem: Problem, search: Search) -> None:
        """Sample, decode, repair, polish, round by round."""
        from dwave.samplers import TabuSampler

        sampler = TabuSampler()

        def sample(encoded: EncodedBqm) -> Any:
            left = search.remaining() / self.num_reads
            return sampler.sample(
                encoded.bqm,
                num_reads=self.num_reads,
                num_restarts=self.num_restarts,
                timeout=int(1000 * left) + 1 if np.isfinite(left) else None,  # milliseconds a read
                seed=int(search.rng.integers(2**31)),
            )

        sample_rounds(problem, search, sample, self.rounds, self.encoding)
