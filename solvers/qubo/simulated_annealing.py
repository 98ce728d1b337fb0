"""Simulated annealing on the QUBO (dwave-samplers), with temperatures derived from the coefficients.

At the first temperature any single bit can flip: it is the largest change from one flip. At the last temperature the
smallest differences between options that matter are frozen. Variables are in the order of the flat options, so that the
same seed gives the same samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from formulations.forms.bqm import EncodedBqm
from formulations.forms.couplings import Floats
from solvers.base import Search
from solvers.qubo.route import QuboSolver, SampleRound, paced

FINEST = 0.03
"""Resolution of the last temperature, as a fraction of the typical sum of an option's pair terms."""


@dataclass(frozen=True)
class SimulatedAnnealing(QuboSolver):
    """Simulated annealing on the QUBO; samples are decoded, repaired and polished.

    Attributes:
        num_reads: number of samples per round.
        num_sweeps: number of sweeps over all bits for each sample.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solution = solve(layered_problem(5), "sa", seed=0, rounds=4)
    >>> solution.feasible, sorted(name for name in solution.details if name.startswith("objective"))
    (True, ['objective_decoded', 'objective_polished', 'objective_raw', 'objective_repaired'])
    """

    name: ClassVar[str] = "sa"
    summary: ClassVar[str] = "simulated annealing on the QUBO (dwave-samplers); decoded, repaired, polished"
    minima: ClassVar[Mapping[str, int]] = {"rounds": 1, "num_reads": 1, "num_sweeps": 1}
    trial_sweeps: ClassVar[int] = 3  # sweeps of the read that measures how many fit into a time limit
    num_reads: int = 10
    num_sweeps: int = 300

    def sampler(self) -> Any:
        """Return the dwave sampler that is called."""
        from dwave.samplers import SimulatedAnnealingSampler

        return SimulatedAnnealingSampler()

    def sampling(self, search: Search) -> SampleRound:
        """Return a function that anneals with the temperatures of `beta_range`."""
        sampler = self.sampler()

        def sample(encoded: EncodedBqm, seconds: float) -> Any:
            def call(reads: int, sweeps: int) -> Any:
                return sampler.sample(
                    encoded.bqm,
                    num_reads=reads,
                    num_sweeps=sweeps,
                    beta_range=beta_range(encoded),
                    seed=int(search.rng.integers(2**31)),
                    interrupt_function=search.expired,  # checked only between two reads
                )

            return paced(call, self.num_reads, self.num_sweeps, seconds, search, self.trial_sweeps)

        return sample


def beta_range(encoded: EncodedBqm) -> tuple[float, float]:
    """Return the first and last inverse temperature for ``encoded``.

    At the first one, an uphill flip that violates a group, or acts against typical pair terms, is accepted half of the
    time. At the last one, a change of the size of the 5 % quantile of relevant changes is accepted once in e³ trials.
    The change of an option is its cost above the cheapest of its group, or the smallest step of the sum of its pair
    terms, whichever is larger.
    """
    starts = encoded.group_offsets[:-1]
    differences = encoded.cost - np.repeat(np.minimum.reduceat(encoded.cost, starts), np.diff(encoded.group_offsets))
    typical, finest = pair_effects(encoded)
    largest = max(float(encoded.penalty.max()), float((differences + 2.0 * typical).max())) or 1.0
    changes = np.maximum(differences, finest)
    felt = changes[changes > 1e-9 * largest]
    smallest = float(np.quantile(felt, 0.05)) if len(felt) else largest
    return np.log(2.0) / largest, 3.0 / max(smallest, 1e-6 * largest)


def pair_effects(encoded: EncodedBqm) -> tuple[Floats, Floats]:
    """Return the typical size ``(V,)`` of the sum of an option's pair terms, and its smallest step ``(V,)``.

    The typical size is that for random choices of the other groups: the root of the sum of squared terms, weighted by
    how often the other option is chosen. The smallest step is the smallest term, or `FINEST` times the typical size if
    there are many different terms.
    """
    rows, columns, values = encoded.pairs
    options, shares = len(encoded.cost), 1.0 / np.diff(encoded.group_offsets)
    met = np.repeat(shares, np.diff(encoded.group_offsets))
    square, least = np.zeros(options), np.full(options, np.inf)
    for own_side, far_side in ((rows, columns), (columns, rows)):
        square += np.bincount(own_side, weights=values**2 * met[far_side], minlength=options)
        np.minimum.at(least, own_side, np.abs(values))
    typical = np.sqrt(square)
    return typical, np.where(square > 0, np.maximum(least, FINEST * typical), 0.0)
