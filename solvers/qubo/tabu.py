"""Tabu search on the QUBO (dwave-samplers); samples are decoded, repaired and polished.

A read ends after a number of restarts, so that the same seed gives the same result unless the time limit ends the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from formulations import Problem
from formulations.forms.bqm import EncodedBqm
from solvers.base import Search
from solvers.qubo.route import QuboSolver, SampleRound

MAX_BITS = 10_000
"""Maximum number of bits of a model: the sampler stores all pairs in a dense matrix (here 0.8 GB)."""


@dataclass(frozen=True)
class Tabu(QuboSolver):
    """Multi-start tabu search on the QUBO.

    Attributes:
        num_reads: number of samples per round.
        num_restarts: number of restarts of each read.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solve(layered_problem(5), "tabu", seed=0, rounds=2).feasible
    True
    """

    name: ClassVar[str] = "tabu"
    summary: ClassVar[str] = "tabu search on the QUBO (dwave-samplers); decoded, repaired, polished"
    usual_rounds: ClassVar[int] = 8
    minima: ClassVar[Mapping[str, int]] = {"rounds": 1, "num_reads": 1, "num_restarts": 0}
    num_reads: int = 2
    num_restarts: int = 2

    def refuse(self, problem: Problem) -> str:
        """Refuse a problem with more bits than a dense matrix can hold."""
        bits = problem.num_options - (0 if self.encoding == "one-hot" else problem.num_groups)
        if bits <= MAX_BITS:
            return QuboSolver.refuse(self, problem)
        return (
            f"solver 'tabu' supports up to {MAX_BITS:,} bits (its matrix is dense), this problem has {bits:,} in "
            f"encoding {self.encoding!r}; use 'auto', 'anneal' or 'sa'"
        )

    def sampling(self, search: Search) -> SampleRound:
        """Return a function that samples reads with a number of restarts, or until the time is over."""
        from dwave.samplers import TabuSampler

        sampler = TabuSampler()

        def sample(encoded: EncodedBqm, seconds: float) -> Any:
            reads = 1 if seconds == 0 else self.num_reads
            return sampler.sample(
                encoded.bqm,
                num_reads=reads,
                num_restarts=0 if seconds == 0 else self.num_restarts,
                timeout=1 + int(1000 * seconds / reads) if np.isfinite(seconds) else None,  # milliseconds per read
                seed=int(search.rng.integers(2**31)),
            )

        return sample
