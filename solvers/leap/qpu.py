"""D-Wave's quantum processors as a back end: the QUBO on chains of qubits, at the dual's price of every budget.

Each run is one problem with ``num_reads`` samples, or several that share them, one for each gauge. The report contains
the fraction of broken chains, the number of qubits, and the time on the processor, separate from the time in the queue.
``simulated=True`` uses D-Wave's local mock of a processor, with the same embedding, gauges and decoding but without a
network, and with steepest descent instead of quantum annealing, so that times of an anneal are only checked.
"""

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from formulations import Problem
from formulations.reductions.scaling import normal_form
from solvers.base import Search
from solvers.bounds.warm import warm_bounds
from solvers.errors import InvalidOptionError, UnsupportedProblemError
from solvers.leap.hybrid import LeapBqm, LeapSolver
from solvers.leap.processor_options import embedding_of, reads_of, refusals, schedule_of

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
        num_reads: number of samples.
        annealing_time_us: time of one anneal in microseconds; None for the processor's default.
        anneal_schedule: points (time in microseconds, anneal fraction) of a forward anneal, from (0, 0) to a
            fraction of 1, in place of ``annealing_time_us``.
        chain_strength: strength of the chains, relative to the one derived from the model's couplings (Ocean's uniform
            torque compensation), so that one value serves problems of every scale; `Solution.details` has the product.
        gauges: number of submissions among which the reads are divided; from the second one on, the signs of random
            variables are flipped (spin-reversal transforms), the same ones in every run.
        embedding: own embedding, a map (or its JSON file, which is read at once) from each variable of the QUBO
            (numbered from 0, as in `formulations.to_bqm`) to its chain of qubits; it may have more variables than
            the QUBO.
        simulated: whether to use a local mock instead of the service, which needs no account.
        topology: topology of the mock: pegasus, zephyr or chimera.
        size: size of the mock's topology (16 for pegasus is a whole processor).

    Raises:
        InvalidOptionError: an option has a wrong value; what the processor takes is checked before anything is sent.
        FileFormatError: the file of ``embedding`` is damaged.

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
    service_knows: ClassVar[str] = "the qubits in use, the time on the processor, which is charged, and the quota"
    minima: ClassVar[Mapping[str, float]] = {"num_reads": 1, "annealing_time_us": 0, "gauges": 1, "size": 1}
    words: ClassVar[Mapping[str, Collection[str]]] = {**LeapBqm.words, "topology": ("pegasus", "zephyr", "chimera")}
    num_reads: int = 100
    annealing_time_us: float | None = None
    anneal_schedule: list[Any] | tuple[Any, ...] | None = None
    chain_strength: float = 1.0
    gauges: int = 1
    embedding: Mapping[Any, Any] | str | None = None
    simulated: bool = False
    topology: str = "pegasus"
    size: int = 4

    def __post_init__(self) -> None:
        """Check the options, and bring schedule and embedding to one form."""
        super().__post_init__()
        if not 0.0 < self.chain_strength < math.inf:
            raise InvalidOptionError(f"option 'chain_strength' must be a number above 0, found {self.chain_strength}")
        if self.gauges > self.num_reads:
            raise InvalidOptionError(
                f"{self.gauges} gauges need at least as many reads, found num_reads={self.num_reads}"
            )
        if self.anneal_schedule is not None:
            if self.annealing_time_us is not None:
                raise InvalidOptionError("set 'annealing_time_us' or 'anneal_schedule', not both")
            object.__setattr__(self, "anneal_schedule", schedule_of(self.anneal_schedule))
        if self.embedding is not None:
            object.__setattr__(self, "embedding", embedding_of(self.embedding))

    @classmethod
    def form_class(cls) -> type["RemoteForm"]:
        """Return the embedded form."""
        from solvers.leap.embedded import EmbeddedForm

        return EmbeddedForm

    def prepare(self) -> None:
        """Compile the inner loops, also those of the prices, whose time is short."""
        LeapBqm.prepare(self)
        warm_bounds()

    @classmethod
    def submissions(cls, options: Mapping[str, Any], time_limit_s: float | None) -> list[dict[str, Any]]:  # noqa: ARG003
        """Return the parameters of the submission of each gauge, with a number of reads instead of a time limit."""
        names = {"annealing_time": "annealing_time_us", "anneal_schedule": "anneal_schedule"}
        shared = {name: value for name, ours in names.items() if (value := options.get(ours)) is not None}
        return [{"num_reads": reads} | shared for reads in reads_of(options["num_reads"], options.get("gauges", 1))]

    def stated(
        self, problem: Problem, connection: "Connection", time_limit: float | None
    ) -> tuple["RemoteForm", "Estimate"]:
        """Return the embedded form, and the estimated time on the processor."""
        from solvers.leap.embedded import EmbeddedForm

        return self._estimated(problem, connection.solver(EmbeddedForm.problem_type, self.remote), time_limit)

    def _estimated(self, problem: Problem, remote: Any, time_limit: float | None) -> tuple["RemoteForm", "Estimate"]:
        from formulations.forms.precision import coefficient_report
        from solvers.leap.embedded import EmbeddedForm, access_time

        seconds = time_limit if self.simulated and time_limit is not None else math.inf  # else only for the service
        form = EmbeddedForm.first(problem, remote, self.option_values, seconds)
        submissions = self.submissions(self.option_values, None)
        guess = access_time(form.sizes()["qubits"], remote, submissions, time_limit)
        return form, replace(guess, coefficients=coefficient_report(form.encoded))

    def estimate(self, problem: Problem, *, time_limit: float | None = None) -> "Estimate":
        """Estimate a submission; a simulated processor uses no network and costs nothing."""
        if not self.simulated:
            return LeapBqm.estimate(self, problem, time_limit=time_limit)
        return self._estimated(normal_form(problem).problem, self._simulator, time_limit)[1]

    def offline(self, problem: Problem, *, time_limit: float | None = None) -> "Estimate":  # noqa: ARG002
        """Estimate what is known without a processor: the QUBO's size, and the effect of the precision."""
        from formulations.forms.precision import coefficient_report
        from solvers.leap.embedded import EmbeddedForm
        from solvers.leap.estimate import without_service

        encoded = EmbeddedForm.priced(normal_form(problem).problem, self.option_values).encoded
        sizes = {"variables": encoded.bqm.num_variables, "couplings": encoded.bqm.num_interactions}
        report = coefficient_report(encoded)
        return without_service(EmbeddedForm.problem_type, sizes, remote=self.remote, coefficients=report)

    def device(self) -> "Device":
        """Return the graph of the processor that would be used."""
        from solvers.leap.connection import connect
        from solvers.leap.device import Device

        if self.simulated:
            return Device("mock", self._mock.properties)
        with connect(self.config) as connection:
            remote = connection.solver("ising", self.remote)
            return Device(remote.name, remote.properties)

    def require_access(self) -> None:
        """Check that an API token is configured, unless the processor is simulated."""
        if not self.simulated:
            LeapBqm.require_access(self)

    def run(self, problem: Problem, search: Search) -> None:
        """Run on the service's processor, or on the local simulated one."""
        if not self.simulated:
            LeapBqm.run(self, problem, search)
            return
        if self.decided(problem, search):
            return
        from solvers.leap.answer import take
        from solvers.leap.embedded import EmbeddedForm

        mock, submissions = self._mock, self.submissions(self.option_values, None)
        if why := refusals(submissions, mock.properties):
            raise UnsupportedProblemError("the mock of a processor cannot solve this problem: " + "; ".join(why))
        with search.phase("build_s"):
            form = EmbeddedForm.first(problem, self._simulator, self.option_values, search.remaining())
        form.tell_times(search.timing)
        with search.phase("solve_s"):
            sampled: list[Any] = []
            for gauge, parameters in enumerate(submissions):
                if sampled and search.expired():
                    break
                mock.substitute_kwargs = {"seed": int(search.rng.integers(2**32))}  # for the sampler inside the mock
                sampled.append(mock.sample(form.on_device(mock.properties, gauge), num_reads=parameters["num_reads"]))
        with search.phase("decode_s"):
            take(problem, search, form.unembedded(sampled, {}))

    def submit(self, problem: Problem, *, time_limit: float | None = None) -> "Job":
        """Send ``problem`` and return its job; a simulated processor has no jobs."""
        if self.simulated:
            raise InvalidOptionError(
                "a simulated processor runs locally and has no jobs: use 'qcompress solve', or solve() without "
                "wait=False; or leave out 'simulated'"
            )
        return LeapBqm.submit(self, problem, time_limit=time_limit)

    @property
    def _simulator(self) -> Any:
        """Return the mock with the attributes of a `dwave.cloud` solver; its time is free."""
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
