"""Steepest descent on the QUBO from random states (dwave-samplers), a baseline that any annealer should beat."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from formulations.forms.bqm import EncodedBqm
from solvers.base import Search
from solvers.qubo.route import QuboSolver, SampleRound, paced

TREE = 30.0
"""Time per node of the sampler's tree of variables, relative to the time per variable of its linear search."""


@dataclass(frozen=True)
class SteepestDescent(QuboSolver):
    """Multi-start steepest descent on the QUBO; samples are decoded, repaired and polished.

    Attributes:
        num_reads: number of random starts per round.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solve(layered_problem(5), "steepest-descent", seed=0, rounds=2).feasible
    True
    """

    name: ClassVar[str] = "steepest-descent"
    summary: ClassVar[str] = "steepest descent on the QUBO from random states (dwave-samplers); the cheap baseline"
    minima: ClassVar[Mapping[str, int]] = {"rounds": 1, "num_reads": 1}
    num_reads: int = 100

    def sampling(self, search: Search) -> SampleRound:
        """Return a function that descends from random states."""
        from dwave.samplers import SteepestDescentSampler

        sampler = SteepestDescentSampler()

        def sample(encoded: EncodedBqm, seconds: float) -> Any:
            def call(reads: int, _: int) -> Any:
                return sampler.sample(
                    encoded.bqm,
                    num_reads=reads,
                    seed=int(search.rng.integers(2**31)),
                    large_sparse_opt=in_tree(encoded.bqm.num_variables, encoded.bqm.num_interactions),
                )

            return paced(call, self.num_reads, 1, seconds, search)

        return sample


def in_tree(variables: int, couplings: int) -> bool:
    """Whether the sampler finds the steepest flip faster in a tree, for the same samples.

    A flip changes as many nodes of a tree as its variable has neighbours; a list is searched as a whole for each flip.

    >>> in_tree(1000, 10_000), in_tree(200_000, 500_000)
    (False, True)
    """
    changed = 2.0 * couplings / max(variables, 1) * math.log2(max(variables, 2))
    return TREE * changed < variables
