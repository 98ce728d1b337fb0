"""Use any dimod sampler as a solver: BQM samplers and composites on the QUBO, CQM samplers on the CQM.

    solve(problem, dwave.samplers.TabuSampler(), parameters={"timeout": 100})

Only parameters that the sampler lists are passed on. Seed and time limit are passed if the sampler has parameters for
them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import dimod
import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from formulations.forms.bqm import ENCODINGS, EncodedBqm
from formulations.forms.cqm import to_cqm
from solvers.base import Search, Solver
from solvers.errors import InvalidOptionError, SolverError
from solvers.kernels.moves import to_arrays
from solvers.kernels.warm import warm
from solvers.qubo.route import refuse_too_many, sample_rounds
from solvers.qubo.samples import Improver, states_of

READS = 20
"""Default number of samples per call (most samplers default to 1)."""


def from_sampler(sampler: object) -> Solver:
    """Return a `Solver` that runs ``sampler``.

    Args:
        sampler: an instance of ``dimod.Sampler`` (composites are samplers too), or any object with ``sample_cqm``.

    Raises:
        InvalidOptionError: ``sampler`` is not a sampler.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solution = solve(layered_problem(3, bits=(2, 4)), dimod.ExactSolver(), seed=0)
    >>> solution.feasible, solution.solver
    (True, 'ExactSolver')
    """
    if isinstance(sampler, type):
        name = sampler.__name__
        raise InvalidOptionError(f"a sampler must be an instance, found the class {name}: write {name}()")
    if callable(getattr(sampler, "sample_cqm", None)):
        return CqmSamplerSolver(sampler)
    if isinstance(sampler, dimod.Sampler):
        return BqmSamplerSolver(sampler)
    raise InvalidOptionError(
        f"solver must be a name, a solvers.Solver, a dimod.Sampler or a CQM sampler, found {type(sampler).__name__}"
    )


@dataclass(frozen=True)
class SamplerSolver(Solver):
    """A dimod sampler as a back end.

    Attributes:
        sampler: the dimod sampler.
        parameters: parameters of the sampler, which must be listed in ``sampler.parameters``.
    """

    name: ClassVar[str] = "sampler"
    summary: ClassVar[str] = "any dimod sampler"
    deterministic: ClassVar[bool] = False  # unknown for an external sampler
    honours_time_limit: ClassVar[bool] = False  # a call of a sampler cannot be interrupted
    sampler: Any = None
    parameters: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", type(self.sampler).__name__)
        super().__post_init__()
        accepted = getattr(self.sampler, "parameters", None) or {}
        if unknown := [name for name in self.parameters or {} if name not in accepted]:
            listed = ", ".join(accepted) or "none"
            raise InvalidOptionError(f"sampler {self.name} has no parameter {', '.join(unknown)}; it has: {listed}")

    def prepare(self) -> None:
        """Compile the inner loops."""
        warm()

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Return option name → default, without the sampler itself."""
        return {name: value for name, value in super().option_defaults().items() if name != "sampler"}

    def arguments(self, search: Search) -> dict[str, Any]:
        """Return the keyword arguments of the call: the caller's, and others for which the sampler has parameters."""
        accepted = getattr(self.sampler, "parameters", None) or {}
        ours: dict[str, Any] = {"num_reads": READS, "seed": int(search.rng.integers(2**31))}
        ours["interrupt_function"] = search.expired
        if np.isfinite(search.remaining()):
            ours["time_limit"] = search.remaining()
        return {name: value for name, value in ours.items() if name in accepted} | dict(self.parameters or {})


@dataclass(frozen=True)
class BqmSamplerSolver(SamplerSolver):
    """A BQM sampler on the QUBO.

    Attributes:
        rounds: number of rounds of sampling, each with better prices of the budgets.
        encoding: name of the encoding, same as in `formulations.to_bqm`.
    """

    native_constraints: ClassVar[bool] = False
    minima: ClassVar[Mapping[str, int]] = {"rounds": 1}
    words: ClassVar[Mapping[str, Collection[str]]] = {"encoding": ENCODINGS}
    rounds: int = 10
    encoding: str = "domain-wall"

    def refuse(self, problem: Problem) -> str:
        """Refuse a problem whose factor would expand to too many couplings."""
        return refuse_too_many(self.name, problem)

    def run(self, problem: Problem, search: Search) -> None:
        """Sample, decode, repair, polish, round by round."""

        def sample(encoded: EncodedBqm, _: float) -> Any:
            return self.sampler.sample(encoded.bqm, **self.arguments(search))

        # a call may be charged for, or take any time, so no call is made just to measure its duration
        sample_rounds(problem, search, sample, self.rounds, self.encoding, trial=False)


@dataclass(frozen=True)
class CqmSamplerSolver(SamplerSolver):
    """A CQM sampler on the model with discrete groups and budgets as constraints."""

    def run(self, problem: Problem, search: Search) -> None:
        """Sample once, repair, polish."""
        improver = Improver(problem, search, to_arrays(problem))
        with search.phase("build_s"):
            cqm = to_cqm(problem).cqm
        with search.phase("solve_s"):
            try:
                sampleset = self.sampler.sample_cqm(cqm, **self.arguments(search))
                states, _ = states_of(sampleset, range(problem.num_options))
                if not len(states):
                    raise SolverError("the sampler returned no samples")
            except Exception as error:  # samplers may raise anything
                search.recover(error)
                return
        with search.phase("decode_s"):
            improver.take(*_read(problem, states))
        improver.quality.tell(search)


def _read(problem: Problem, states: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return choices ``(n, G)`` and which states are valid; invalid groups take the first option on, or their first."""
    starts, flat = problem.group_offsets[:-1], np.arange(problem.num_options)
    on = states > 0
    first = np.minimum.reduceat(np.where(on, flat, flat + len(flat)), starts, axis=1) % len(flat)
    valid = (np.add.reduceat(on.astype(np.int64), starts, axis=1) == 1).all(axis=1)
    return first - starts, valid
