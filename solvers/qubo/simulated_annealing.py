"""Simulated annealing on the QUBO (dwave-samplers), with temperatures derived from the coefficients.

The first temperature lets any single bit flip: the largest change that one flip can make. The last one freezes the
finest differences between options that matter. What always holds: variables stand in the order of the flat options,
so that a seed gives the same samples again.
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
"""Share of what an option's pair terms typically add up to that a last temperature still tells apart."""


@dataclass(frozen=True)
class SimulatedAnnealing(QuboSolver):
    """Simulated annealing on the QUBO; samples are decoded, repaired and polished.

    Attributes:
        num_reads: samples a round.
        num_sweeps: sweeps over all bits for each sample.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solution = solve(layered_problem(5), "sa", seed=0, rounds=4)
    >>> solution.feasible, sorted(name for name in solution.details if name.startswith("objective"))
    (True, ['objective_decoded', 'objective_polished', 'objective_raw', 'objective_repaired'])
    """

    name: ClassVar[str] = "sa"
    summary: ClassVar[str] = "simulated annealing on the QUBO (dwave-samplers); decoded, repaired, polished"
    minima: ClassVar[Mapping[str, int]] = {"rounds": 1, "num_reads": 1, "num_sweeps": 1}
    trial_sweeps: ClassVar[int] = 3  # of the read that measures how many fit into a time limit
    num_reads: int = 10
    num_sweeps: int = 300

    def sampler(self) -> Any:
        """The dwave sampler that is called."""
        from dwave.samplers import SimulatedAnnealingSampler

        return SimulatedAnnealingSampler()

    def sampling(self, search: Search) -> SampleRound:
        """Anneal from ``beta_range``."""
        sampler = self.sampler()

        def sample(encoded: EncodedBqm, seconds: float) -> Any:
            def call(reads: int, sweeps: int) -> Any:
                return sampler.sample(
                    encoded.bqm,
                    num_reads=reads,
                    num_sweeps=sweeps,
                    beta_range=beta_range(encoded),
                    seed=int(search.rng.integers(2**31)),
                    interrupt_function=search.expired,  # looked at between two reads only
                )

            return paced(call, self.num_reads, self.num_sweeps, seconds, search, self.trial_sweeps)

        return sample


def beta_range(encoded: EncodedBqm) -> tuple[float, float]:
    """First and last inverse temperature for ``encoded``.

    The first: an uphill flip that breaks a group, or goes against typical pair terms, is taken half of the time. The
    last: the 5 % quantile of the changes that matter is passed once in e³ tries. What an option changes is what it
    costs above the cheapest of its group or the finest of what its pair terms add up to, whichever is larger.
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
    """``(V,)`` what an option's pair terms add up to: typically, and in the finest steps.

    Typically for random choices of the others: the root of the sum of squares of its terms, each of which is met as
    often as its other option is chosen. The finest step is the least term, or `FINEST` of the typical sum where many
    different terms leave no step.
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
