"""D-Wave's quantum processors as a back end: the QUBO on chains of qubits, at the dual's price of every budget.

One run is one problem of ``num_reads`` samples. Chains are held together by a strength derived from the model's
couplings (uniform torque compensation); what of them broke is reported, with the qubits used and the time on the
processor apart from the time in the queue. ``simulated=True`` takes D-Wave's mock of a processor on this machine:
the same embedding and decoding without a network, by steepest descent instead of quantum annealing.
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from formulations import Problem
from formulations.reductions.scaling import normal_form
from solvers.base import Search
from solvers.errors import InvalidOptionError
from solvers.leap.hybrid import LeapBqm, LeapSolver

if TYPE_CHECKING:
    from solvers.leap.connection import Connection
    from solvers.leap.device import Device
    from solvers.leap.estimate import Estimate
    from solvers.leap.forms import RemoteForm
    from solvers.leap.job import Job


@dataclass(frozen=True)
class QuantumProcessor(LeapBqm):
    """A quantum processor.

    Attributes:
        num_reads: samples.
        annealing_time_us: microseconds of one anneal; None: the processor's default.
        simulated: take a mock on this machine instead of the service; needs no account.
        topology: of the mock: pegasus, zephyr or chimera.
        size: of the mock's topology (16 for pegasus is a whole processor).

    >>> import tempfile
    >>> from formulations.generators.random_instances import layered_problem
    >>> from solvers import solve
    >>> solution = solve(layered_problem(4), "qpu", simulated=True, seed=0, jobs=tempfile.mkdtemp())
    >>> solution.feasible, solution.details["variables"]
    (True, 20)
    """

    name: ClassVar[str] = "qpu"
    summary: ClassVar[str] = "a D-Wave quantum processor, or its mock: embedded QUBO; decoded, repaired, polished"
    distributions: ClassVar[tuple[str, ...]] = (*LeapSolver.distributions, "dwave-system", "minorminer")
    uploads: ClassVar[bool] = False
    minima: ClassVar[Mapping[str, int]] = {"num_reads": 1}
    words: ClassVar[Mapping[str, Collection[str]]] = {**LeapBqm.words, "topology": ("pegasus", "zephyr", "chimera")}
    num_reads: int = 100
    annealing_time_us: float | None = None
    simulated: bool = False
    topology: str = "pegasus"
    size: int = 4

    @classmethod
    def form_class(cls) -> type["RemoteForm"]:
        """The embedded form."""
        from solvers.leap.embedded import EmbeddedForm

        return EmbeddedForm

    @classmethod
    def parameters(cls, options: Mapping[str, Any], time_limit_s: float | None) -> dict[str, Any]:  # noqa: ARG003
        """The parameters of a submission: the processor takes numbers of reads, not seconds."""
        parameters = {"num_reads": options["num_reads"], "annealing_time": options["annealing_time_us"]}
        return {name: value for name, value in parameters.items() if value is not None}

    def stated(
        self, problem: Problem, connection: "Connection", time_limit: float | None
    ) -> tuple["RemoteForm", "Estimate"]:
        """The embedded form, and the time that the processor would need for it."""
        from solvers.leap.embedded import EmbeddedForm

        return self._estimated(problem, connection.solver(EmbeddedForm.problem_type, self.remote), time_limit)

    def _estimated(self, problem: Problem, remote: Any, time_limit: float | None) -> tuple["RemoteForm", "Estimate"]:
        from formulations.forms.precision import coefficient_report
        from solvers.leap.embedded import EmbeddedForm, access_time

        form = EmbeddedForm.first(problem, remote, self.option_values)
        parameters = self.parameters(self.option_values, None)
        guess = access_time(form.sizes()["qubits"], remote, parameters, time_limit)
        return form, replace(guess, coefficients=coefficient_report(form.encoded))

    def estimate(self, problem: Problem, *, time_limit: float | None = None) -> "Estimate":
        """Estimate what a submission would take; a simulated processor asks nobody and costs nothing."""
        if not self.simulated:
            return LeapBqm.estimate(self, problem, time_limit=time_limit)
        return self._estimated(normal_form(problem).problem, self._simulator, time_limit)[1]

    def device(self) -> "Device":
        """The graph of the processor that would be taken."""
        from solvers.leap.connection import connect
        from solvers.leap.device import Device

        if self.simulated:
            return Device("mock", self._mock.properties)
        with connect(self.config) as connection:
            remote = connection.solver("ising", self.remote)
            return Device(remote.name, remote.properties)

    def run(self, problem: Problem, search: Search) -> None:
        """Run on the service's processor, or on the simulated one on this machine."""
        if not self.simulated:
            LeapBqm.run(self, problem, search)
            return
        if self.decided(problem, search):
            return
        from solvers.leap.answer import take
        from solvers.leap.embedded import EmbeddedForm

        mock = self._mock
        with search.phase("build_s"):
            form = EmbeddedForm.first(problem, self._simulator, self.option_values)
        with search.phase("solve_s"):
            mock.substitute_kwargs = {"seed": int(search.rng.integers(2**32))}  # of what it samples with
            sampleset = mock.sample(form.on_device(mock.properties), num_reads=self.num_reads)
            sampleset.resolve()
        with search.phase("decode_s"):
            take(problem, search, form.unembedded(sampleset, {}))

    def submit(self, problem: Problem, *, time_limit: float | None = None) -> "Job":
        """Send ``problem`` and return its job; a simulated processor has none."""
        if self.simulated:
            raise InvalidOptionError(
                "a simulated processor runs on this machine and has no jobs: leave out 'simulated' or 'wait'"
            )
        return LeapBqm.submit(self, problem, time_limit=time_limit)

    @property
    def _simulator(self) -> Any:
        """The mock as `dwave.cloud` describes a solver; its time is free."""
        properties = self._mock.properties
        return SimpleNamespace(name="mock", properties=properties, estimate_qpu_access_time=lambda **_: 0.0)

    @property
    def _mock(self) -> Any:
        return _mock(self.topology, self.size)


@functools.lru_cache(maxsize=4)
def _mock(topology: str, size: int) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from dwave.system.testing import MockDWaveSampler

    shape = {"pegasus": [size], "zephyr": [size, 4], "chimera": [size, size, 4]}[topology]
    return MockDWaveSampler(topology_type=topology, topology_shape=shape, parameter_warnings=False)
