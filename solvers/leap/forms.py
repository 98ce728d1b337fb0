"""Forms of a problem for the kinds of hybrid solvers: sizes, model files, and decoding of answers.

A form is made from a problem and a small record that JSON can store. The same problem and record always give the same
form, so a job can be decoded on another day. Sizes are counted without building the model. Every form states the
problem exactly, except that the BQM may have to price its budgets, which its record then says.
"""

import contextlib
import functools
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import dimod
import numpy as np
from numpy.typing import NDArray

from formulations import EncodingError, Problem
from formulations.forms.bqm import EncodedBqm, to_bqm
from formulations.forms.cqm_file import cqm_file, num_pairs
from solvers.bounds.duality import dual_bound
from solvers.kernels.moves import Floats, Integers
from solvers.leap.connection import Connection
from solvers.qubo.samples import states_of

PRICES_S = 1.0
"""Maximum time in seconds for the prices of budgets that slack bits cannot express."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Decoded samples of an answer.

    Attributes:
        choices: ``(n, G)`` decoded choices.
        valid: ``(n,)`` whether each sample had exactly one option per group before decoding.
        energies: ``(n,)`` energies in the form's model; None if the service gives none.
        timing_us: times in microseconds, with the names that the service uses.
        details: additional entries for the report.
    """

    choices: Integers
    valid: NDArray[np.bool_]
    energies: Floats | None = None
    timing_us: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


class RemoteForm(ABC):
    """A problem in the form for one kind of solver.

    Attributes:
        problem: the problem as solvers see it, with its objective scaled to about 1.
        record: record that JSON can store, from which the same form can be made again.
        timing: time in seconds of what is not the building itself: tuning (prices of budgets) and embedding.
    """

    problem_type: ClassVar[str]  # name used by the service
    limits: ClassVar[Mapping[str, str]]  # size → property of a solver that limits it

    def __init__(self, problem: Problem, record: Mapping[str, Any]) -> None:
        self.problem, self.record = problem, dict(record)
        self.timing: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the duration of a ``with`` block in `timing`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.timing[name] = time.perf_counter() - begun

    def tell_times(self, timing: dict[str, float]) -> None:
        """Add `timing` to that of a search, which has counted it as time to build the form."""
        for name, seconds in self.timing.items():
            timing[name] = timing.get(name, 0.0) + seconds
            timing["build_s"] -= seconds

    @classmethod
    def first(cls, problem: Problem, remote: Any, options: Mapping[str, Any]) -> "RemoteForm":  # noqa: ARG003
        """Make the form of a new problem for the service's solver ``remote``; None is enough for hybrid forms."""
        return cls(problem, {})

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the sizes that `limits` bounds."""

    @abstractmethod
    def min_time_s(self, properties: Mapping[str, Any]) -> float:
        """Return the minimum time limit in seconds that a solver with these properties accepts for the problem."""

    def file(self) -> Any:
        """Return the model as a binary file, open at its beginning; for forms that are uploaded."""
        raise NotImplementedError

    def data(self, remote: Any, gauge: int = 0) -> dict[str, Any]:
        """Return the model as the data of a submission to ``remote``; for forms that are not uploaded."""
        raise NotImplementedError

    @abstractmethod
    def decode(self, answers: Sequence[Any], connection: Connection) -> Samples:
        """Decode the answers of the service, one for each submission, to choices."""


class CqmForm(RemoteForm):
    """The CQM form, with discrete groups and budgets as constraints; a factor's products are expanded."""

    problem_type = "cqm"
    limits: ClassVar = {
        "variables": "maximum_number_of_variables",
        "constraints": "maximum_number_of_constraints",
        "biases": "maximum_number_of_biases",
    }

    def sizes(self) -> dict[str, int]:
        """Count as in `formulations.forms.cqm_file`: a bias per variable in objective and group, budgets and pairs."""
        problem = self.problem
        used = sum(int(np.count_nonzero(problem.resources[name])) for name in problem.budgets)
        return {
            "variables": problem.num_options,
            "constraints": problem.num_groups + len(problem.budgets),
            "biases": 2 * problem.num_options + used + num_pairs(problem),
        }

    def min_time_s(self, properties: Mapping[str, Any]) -> float:
        """Sum the sizes with the weights that the solver publishes."""
        size = self.sizes()
        weighted = (
            properties.get("num_variables_multiplier", 1.57e-04) * size["variables"]
            + properties.get("num_biases_multiplier", 4.65e-06) * size["biases"]
            + properties.get("num_constraints_multiplier", 6.44e-09) * size["variables"] * size["constraints"]
        )
        return max(float(weighted), float(properties["minimum_time_limit_s"]))

    def file(self) -> Any:
        """Return the model in dimod's CQM format."""
        return cqm_file(self.problem)

    def decode(self, answers: Sequence[Any], connection: Connection) -> Samples:  # noqa: ARG002
        """Decode each group to the first option that is on, or its first option; mark samples without exactly one."""
        sampleset = dimod.SampleSet.from_serializable(answers[0].data)
        columns = [sampleset.variables.index(v) for v in range(self.problem.num_options)]
        on = sampleset.record.sample[:, columns] > 0.5
        starts, flat = self.problem.group_offsets[:-1], np.arange(self.problem.num_options)
        first = np.minimum.reduceat(np.where(on, flat, flat + len(flat)), starts, axis=1) % len(flat)
        valid = (np.add.reduceat(on.astype(np.int64), starts, axis=1) == 1).all(axis=1)
        energies = np.asarray(sampleset.record.energy, dtype=np.float64)
        return Samples(choices=first - starts, valid=valid, energies=energies, timing_us=_times(sampleset.info))


class BqmForm(RemoteForm):
    """The QUBO form, with slack bits for budgets if uses are whole numbers, and otherwise the dual's prices.

    Its record has ``encoding`` and ``prices`` (name → price in the scaled objective, or None for slack bits).
    """

    problem_type = "bqm"
    limits: ClassVar = {"variables": "maximum_number_of_variables", "biases": "maximum_number_of_biases"}

    @classmethod
    def first(cls, problem: Problem, remote: Any, options: Mapping[str, Any]) -> "BqmForm":  # noqa: ARG003
        """Use slack bits if they can express the budgets exactly, and prices otherwise."""
        form = cls(problem, {"encoding": options["encoding"], "prices": None})
        try:
            _ = form.encoded
        except EncodingError:  # fractional uses, or too many pairs with slack bits: use prices, which are reported
            form = cls(problem, {"encoding": options["encoding"]})
            with form.phase("tune_s"):
                form.record["prices"] = dual_bound(problem, time_limit=PRICES_S).prices
            _ = form.encoded
        return form

    @functools.cached_property
    def encoded(self) -> EncodedBqm:
        """The encoded model."""
        return to_bqm(self.problem, self.record["encoding"], prices=self.record["prices"])

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the built model."""
        bqm = self.encoded.bqm
        return {"variables": bqm.num_variables, "biases": bqm.num_variables + bqm.num_interactions}

    def min_time_s(self, properties: Mapping[str, Any]) -> float:
        """Interpolate linearly between the values that the solver publishes."""
        variables, seconds = zip(*properties["minimum_time_limit"], strict=True)
        return float(np.interp(self.encoded.bqm.num_variables, variables, seconds))

    def file(self) -> Any:
        """Return the model in dimod's BQM format."""
        return self.encoded.bqm.to_file()

    def decode(self, answers: Sequence[Any], connection: Connection) -> Samples:  # noqa: ARG002
        """Decode groups with several options on to the cheapest of them, and with none on to the cheapest of all."""
        sampleset = dimod.SampleSet.from_serializable(answers[0].data)
        return bqm_samples(self.encoded, sampleset, _times(sampleset.info))


class NonlinearForm(RemoteForm):
    """The nonlinear form, with integer decisions and look-up tables; a factor is not expanded."""

    problem_type = "nl"
    limits: ClassVar = {
        "nodes": "maximum_number_of_nodes",
        "state_bytes": "maximum_state_size",
        "decision_state_bytes": "maximum_decision_state_size",
    }

    @functools.cached_property
    def encoded(self) -> Any:
        """The model with its decision."""
        from formulations.forms.nonlinear import to_nonlinear

        return to_nonlinear(self.problem)

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the built model."""
        model = self.encoded.model
        sizes = (model.num_nodes(), model.state_size(), model.decision_state_size())
        return dict(zip(self.limits, map(int, sizes), strict=True))

    def min_time_s(self, properties: Mapping[str, Any]) -> float:
        """Return the service's estimate, with the weights that the solver publishes."""
        nodes, state, _ = self.sizes().values()
        weighted = (
            properties.get("num_nodes_multiplier", 8.306792043756981e-05) * nodes
            + properties.get("state_size_multiplier", 2.8379674360396316e-10) * state
            + properties.get("num_nodes_state_size_multiplier", 2.1097317822863966e-12) * nodes * state
            + properties.get("offset", 0.012671678446550175)
        )
        return max(float(weighted), float(properties.get("min_time_limit", 5)))

    def file(self) -> Any:
        """Return the model in dwave-optimization's format, without states."""
        return self.encoded.model.to_file()

    def decode(self, answers: Sequence[Any], connection: Connection) -> Samples:
        """Read the choices; every state is one choice."""
        (answer,), model = answers, self.encoded.model
        with connection.download(answer) as downloaded, tempfile.TemporaryFile() as file, model.lock():
            file.write(downloaded.read())
            file.seek(0)
            model.states.from_file(file, check_header=False)  # the service uses another name for the model
            choices = self.encoded.choices()
        return Samples(choices=choices, valid=np.ones(len(choices), dtype=bool), timing_us=_times(answer.timing))


def bqm_samples(encoded: EncodedBqm, sampleset: Any, timing_us: Mapping[str, float], **details: Any) -> Samples:
    """Convert a dimod sample set of an encoded model to `Samples`, lowest energy first."""
    states, energies = states_of(sampleset, encoded.bqm.variables)
    return Samples(
        choices=encoded.decode_all(states),
        valid=encoded.valid(states),
        energies=energies,
        timing_us=timing_us,
        details=details,
    )


def _times(info: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in info.items() if isinstance(value, int | float)}
