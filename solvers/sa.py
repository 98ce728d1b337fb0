"""Simulated annealing on the QUBO (dwave-samplers), with temperatures derived from the coefficients.

The first temperature lets any single bit flip: the largest change that one flip can make. The last one freezes the
finest differences between options that matter. What always holds: variables stand in the order of the flat options,
so that a seed gives the same samples again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from formulations import Problem
from formulations.bqm import ENCODINGS, EncodedBqm
from solvers.base import Search, Solver
from solvers.errors import InvalidOptionError
from solvers.qubo import sample_rounds
from solvers.warm import warm

TRIAL_SWEEPS = 3
"""Sweeps of the read that measures how many fit into a time limit."""


SHARE = 0.25
"""Share of the time left that one round may take, so that the budgets' prices see several rounds."""


@dataclass(frozen=True)
class SimulatedAnnealing(Solver):
    """Simulated annealing on the QUBO; samples are decoded, repaired and polished.

    Attributes:
        num_reads: samples a round.
        num_sweeps: sweeps over all bits for each sample.
        rounds: samplings, each with better prices of the budgets.
        encoding: of `formulations.to_bqm`.

    >>> from solvers import solve
    >>> from formulations.instances import layered_problem
    >>> solution = solve(layered_problem(5), "sa", seed=0, rounds=4)
    >>> solution.feasible, sorted(name for name in solution.details if name.startswith("objective"))
    (True, ['objective_decoded', 'objective_polished', 'objective_raw', 'objective_repaired'])
    """

    name: ClassVar[str] = "sa"
    summary: ClassVar[str] = "simulated annealing on the QUBO (dwave-samplers); decoded, repaired, polished"
    native_constraints: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ("dimod", "dwave.samplers")
    num_reads: int = 10
    num_sweeps: int = 300
    rounds: int = 12
    encoding: str = "domain-wall"

    def __post_init__(self) -> None:
        for option in ("num_reads", "num_sweeps", "rounds"):
            if getattr(self, option) < 1:
                raise InvalidOptionError(
                    f"option {option!r} of {self.name!r} must be at least 1, found {getattr(self, option)}"
                )
        if self.encoding not in ENCODINGS:
            raise InvalidOptionError(
                f"option 'encoding' of {self.name!r} knows {', '.join(ENCODINGS)}, found {self.encoding!r}"
            )

    def sampler(self) -> Any:
        """The dwave sampler that is called."""
        from dwave.samplers import SimulatedAnnealingSampler

        return SimulatedAnnealingSampler()

    def prepare(self) -> None:
        """Compile the loops."""
        warm()

    def run(self, problem: Problem, search: Search) -> None:
        """Sample, decode, repair, polish, round by round."""
        sampler = self.sampler()

        def call(encoded: EncodedBqm, num_reads: int, num_sweeps: int) -> Any:
            return sampler.sample(
                encoded.bqm,
                num_reads=num_reads,
                num_sweeps=num_sweeps,
                beta_range=beta_range(encoded),
                seed=int(search.rng.integers(2**31)),
                interrupt_function=search.expired,
            )

        def sample(encoded: EncodedBqm) -> Any:
            num_reads, num_sweeps = self.num_reads, self.num_sweeps
            if np.isfinite(search.remaining()):  # the sampler looks at the clock only between two reads
                begun = search.elapsed()
                trial = call(encoded, 1, TRIAL_SWEEPS)
                trial_wall_s = search.elapsed() - begun
                if search.remaining() < trial_wall_s:  # no time to convert the model once more
                    return trial
                timing = trial.info.get("timing")  # without the conversion of the model, where the sampler tells
                trial_s = 1e-9 * timing["sampling_ns"] if timing else trial_wall_s
                sweep_s = trial_s / TRIAL_SWEEPS
                affordable = SHARE * search.remaining() / sweep_s
                num_sweeps = max(1, min(num_sweeps, int(affordable)))
                num_reads = max(1, min(num_reads, int(affordable / num_sweeps)))
            return call(encoded, num_reads, num_sweeps)

        sample_rounds(problem, search, sample, self.rounds, self.encoding)


def beta_range(encoded: EncodedBqm) -> tuple[float, float]:
    """First and last inverse temperature for ``encoded``.

    The first: an uphill flip that breaks a group is taken half of the time. The last: the 5 % quantile of what
    options of one group differ by in cost is passed once in e³ tries.
    """
    starts = encoded.group_offsets[:-1]
    differences = encoded.cost - np.repeat(np.minimum.reduceat(encoded.cost, starts), np.diff(encoded.group_offsets))
    largest = max(float(encoded.penalty.max()), float(differences.max()))
    felt = differences[differences > 1e-9 * largest]
    smallest = float(np.quantile(felt, 0.05)) if len(felt) else largest
    return np.log(2.0) / largest, 3.0 / max(smallest, 1e-6 * largest)
