"""Any dimod sampler as a solver: BQM samplers and composites through the QUBO, CQM samplers through the CQM.

    solve(problem, dwave.samplers.TabuSampler(), parameters={"timeout": 100})

What always holds: only parameters that the sampler itself lists are passed on; seed and time limit are passed where
the sampler has a parameter for them.
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
"""Samples per call where the caller does not say (samplers themselves mostly default to 1)."""


def from_sampler(sampler: object) -> Solver:
    """A `Solver` that runs ``sampler``.

    Args:
        sampler: an instance of ``dimod.Sampler`` (a composite is one), or anything with ``sample_cqm``.

    Raises:
        InvalidOptionError: anything else.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solution = solve(layered_problem(3, bits=(2, 4)), dimod.ExactSolver(), seed=0)
    >>> solution.feasible, solution.solver
    (True, 'ExactSolver')
    """
    if isinstance(sampler, type):
        name = sampler.__name__
        raise InvalidOptionError(f"a sampler is given as an instance, found the class {name}: write {name}()")
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
        parameters: passed to the sampler; only what it lists in ``sampler.parameters``.
    """

    name: ClassVar[str] = "sampler"
    summary: ClassVar[str] = "any dimod sampler"
    deterministic: ClassVar[bool] = False  # nothing is known about a sampler from outside
    honours_time_limit: ClassVar[bool] = False  # a call into a sampler cannot be cut
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
        """Compile the loops."""
        warm()

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Option name → default; the sampler itself is no option."""
        return {name: value for name, value in super().option_defaults().items() if name != "sampler"}

    def arguments(self, search: Search) -> dict[str, Any]:
        """The call's keywords: the caller's, and what the sampler has a parameter for."""
        accepted = getattr(self.sampler, "parameters", None) or {}
        ours: dict[str, Any] = {"num_reads": READS, "seed": int(search.rng.integers(2**31))}
        ours["interrupt_function"] = search.expired
        if np.isfinite(search.remaining()):
            ours["time_limit"] = search.remaining()
        return {name: value for name, value in ours.items() if name in accepted} | dict(self.parameters or {})


@dataclass(frozen=True)
class BqmSamplerSolver(SamplerSolver):
    """A BQM sampler through the QUBO.

    Attributes:
        rounds: samplings, each with better prices of the budgets.
        encoding: of `formulations.to_bqm`.
    """

    native_constraints: ClassVar[bool] = False
    minima: ClassVar[Mapping[str, int]] = {"rounds": 1}
    words: ClassVar[Mapping[str, Collection[str]]] = {"encoding": ENCODINGS}
    rounds: int = 10
    encoding: str = "domain-wall"

    def refuse(self, problem: Problem) -> str:
        """Refuse a factor that makes too many couplings when it is expanded."""
        return refuse_too_many(self.name, problem)

    def run(self, problem: Problem, search: Search) -> None:
        """Sample, decode, repair, polish, round by round."""

        def sample(encoded: EncodedBqm, _: float) -> Any:
            return self.sampler.sample(encoded.bqm, **self.arguments(search))

        # a call may be charged for, or take as long as it likes: none is made just to see how long it takes
        sample_rounds(problem, search, sample, self.rounds, self.encoding, trial=False)


@dataclass(frozen=True)
class CqmSamplerSolver(SamplerSolver):
    """A CQM sampler: discrete groups and budgets as constraints of the model."""

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
            except Exception as error:  # whatever a sampler fails with
                search.recover(error)
                return
        with search.phase("decode_s"):
            improver.take(*_read(problem, states))
        improver.quality.tell(search)


def _read(problem: Problem, states: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Choices ``(n, G)`` and which states were valid; in a group that is not, the first option on, or the first."""
    starts, flat = problem.group_offsets[:-1], np.arange(problem.num_options)
    on = states > 0
    first = np.minimum.reduceat(np.where(on, flat, flat + len(flat)), starts, axis=1) % len(flat)
    valid = (np.add.reduceat(on.astype(np.int64), starts, axis=1) == 1).all(axis=1)
    return first - starts, valid
