"""Simulated quantum annealing on the QUBO (path-integral Monte Carlo, dwave-samplers).

Everything else is as in `solvers.qubo.simulated_annealing`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from solvers.qubo.simulated_annealing import SimulatedAnnealing


@dataclass(frozen=True)
class PathIntegral(SimulatedAnnealing):
    """Path-integral annealing on the QUBO; samples are decoded, repaired and polished.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solve(layered_problem(5), "sqa", seed=0, rounds=2).feasible
    True
    """

    name: ClassVar[str] = "sqa"
    summary: ClassVar[str] = "simulated quantum annealing on the QUBO (path integral, dwave-samplers)"
    usual_rounds: ClassVar[int] = 8
    trial_sweeps: ClassVar[int] = 1
    num_reads: int = 2  # a sweep takes as long as about ten sweeps of plain annealing
    num_sweeps: int = 100

    def sampler(self) -> Any:
        """Return the dwave sampler that is called."""
        from dwave.samplers import PathIntegralAnnealingSampler

        return PathIntegralAnnealingSampler()
