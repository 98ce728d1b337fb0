"""Tabu search on the QUBO (dwave-samplers); samples are decoded, repaired and polished.

What always holds: a read ends after a number of restarts, so that a seed gives the same answer again, unless the
time limit cuts it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from formulations.forms.bqm import EncodedBqm
from solvers.base import Search
from solvers.qubo.route import QuboSolver, SampleRound


@dataclass(frozen=True)
class Tabu(QuboSolver):
    """Multi-start tabu search on the QUBO.

    Attributes:
        num_reads: samples a round.
        num_restarts: restarts of each read.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solve(layered_problem(5), "tabu", seed=0, rounds=2).feasible
    True
    """

    name: ClassVar[str] = "tabu"
    summary: ClassVar[str] = "tabu search on the QUBO (dwave-samplers); decoded, repaired, polished"
    least: ClassVar[dict[str, int]] = {"rounds": 1, "num_reads": 1, "num_restarts": 0}
    rounds: int = 8
    num_reads: int = 2
    num_restarts: int = 2

    def sampling(self, search: Search) -> SampleRound:
        """Reads with a number of restarts, or as long as there is time."""
        from dwave.samplers import TabuSampler

        sampler = TabuSampler()

        def sample(encoded: EncodedBqm, seconds: float) -> Any:
            reads = 1 if seconds == 0 else self.num_reads
            return sampler.sample(
                encoded.bqm,
                num_reads=reads,
                num_restarts=0 if seconds == 0 else self.num_restarts,
                timeout=1 + int(1000 * seconds / reads) if np.isfinite(seconds) else None,  # milliseconds a read
                seed=int(search.rng.integers(2**31)),
            )

        return sample
