"""The interface between `solve` and a back end.

A back end is a frozen dataclass derived from `Solver`. Its fields are its options (so they can be listed, checked and
pickled), its class attributes describe its capabilities, and its one method `run(problem, search)` does the work.

A back end does not evaluate its own results. It passes choices to ``search.offer`` and proven lower bounds to
``search.raise_bound``. `solvers.search.Search` evaluates every choice with `Problem.evaluate`, keeps the incumbent, the
trace and the clock, and alone decides the status. The back end sees a problem whose objective is scaled to about 1 and
which is usually only a part of the original problem; its results are mapped back automatically.
"""

import dataclasses
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from formulations import Problem
from formulations.reductions.pricing import priced
from solvers.errors import InvalidOptionError, SolverUnavailableError, UnsupportedProblemError
from solvers.option_types import annotations, described, fits
from solvers.search import OnProgress, Progress, Search
from solvers.solution import relative_gap
from solvers.sub_search import SubSearch

__all__ = ["OnProgress", "Progress", "Search", "Solver", "SolverInfo", "SolverLike", "SubSearch", "relative_gap"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverInfo:
    """Description of a back end and its capabilities; ``options`` maps each option to its default."""

    name: str
    summary: str
    available: bool
    why_not: str
    exact: bool
    native_constraints: bool
    native_pairs: bool
    needs_network: bool
    options: Mapping[str, Any]


class Solver(ABC):
    """Base class of back ends. Subclasses are frozen dataclasses whose fields are options with defaults."""

    name: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[bool] = False  # proves optimality if given enough time
    native_constraints: ClassVar[bool] = True  # supports budgets directly (without penalties)
    native_pairs: ClassVar[bool] = True  # supports pair terms
    native_use_pairs: ClassVar[bool] = False  # supports pair terms in budgets directly (see `takes_use_pairs`)
    anneals_use_pairs: ClassVar[bool] = False  # its choices are annealed with the true uses of such budgets
    needs_network: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True  # same seed, same answer unless a time limit ends the run
    honours_time_limit: ClassVar[bool] = True  # ends in time; False only if external code cannot be stopped
    presolved: ClassVar[bool] = True  # may get a reduced problem; False if it needs the original problem
    requires: ClassVar[tuple[str, ...]] = ()  # modules that it imports when it runs
    extra: ClassVar[str] = ""  # extra that installs them: pip install 'qcompress[extra]'
    minima: ClassVar[Mapping[str, float]] = {}  # option → its minimum (a default of None is accepted too)
    words: ClassVar[Mapping[str, Collection[str]]] = {}  # option → the words that it accepts
    made_in: ClassVar[str] = ""  # in an instance that an import path names: the module of that path

    def __post_init__(self) -> None:
        """Check the values of the options, and store numpy's numbers as Python's.

        Raises:
            InvalidOptionError: a value has another type than the field, a number is below its minimum, or a word is
                not among the accepted ones.
        """
        hints = annotations(type(self))
        for option, value in self.option_values.items():
            if isinstance(value, np.generic):  # which JSON cannot store
                value = value.item()
                object.__setattr__(self, option, value)
            if option in hints and option not in self.words and not fits(value, hints[option]):
                wanted = described(hints[option])
                raise InvalidOptionError(f"option {option!r} of {self.name!r} must be {wanted}, found {value!r}")
        for option, least in self.minima.items():
            value = getattr(self, option)
            if value is not None and not value >= least:
                raise InvalidOptionError(f"option {option!r} of {self.name!r} must be at least {least}, found {value}")
        for option, known in self.words.items():
            if not isinstance(value := getattr(self, option), str) or value not in known:
                raise InvalidOptionError(
                    f"option {option!r} of {self.name!r} must be one of {', '.join(known)}, found {value!r}"
                )

    @abstractmethod
    def run(self, problem: Problem, search: "Search") -> None:
        """Search ``problem`` until done or ``search.expired()``, and report all results to ``search``."""

    def submit(self, problem: Problem, *, time_limit: float | None = None) -> Any:  # noqa: ARG002
        """Send ``problem`` to a service and return its job immediately; only for services (see `solvers.leap`).

        Raises:
            InvalidOptionError: the back end runs locally.
        """
        raise InvalidOptionError(f"solver {self.name!r} runs locally; wait=False is only for the leap solvers")

    def prepare(self) -> None:  # noqa: B027 - most back ends have nothing to prepare
        """Compile or load everything that a run needs. `solve` calls this before the clock starts."""

    def refuse(self, problem: Problem) -> str:
        """Say why this back end does not support ``problem``, and which ones do; an empty string if it does."""
        return self.refuse_kind(pairs=bool(problem.pairs))

    def refuse_kind(self, *, pairs: bool) -> str:
        """Say why this back end supports no problem with (or without) pair terms; an empty string if it supports some.

        This is known before there is a problem (see `require_kind`).
        """
        if pairs and not self.native_pairs:
            return (
                f"solver {self.name!r} takes no pair terms; use 'auto', 'anneal' or 'milp', "
                "or formulate with pairs=False"
            )
        return ""

    def require_access(self) -> None:  # noqa: B027 - most back ends run here
        """Check, without the network, that the credentials of a service are configured."""

    def takes_use_pairs(self, problem: Problem) -> bool:  # noqa: ARG002 - some depend on the size
        """Whether this back end takes the pair terms in the budgets of ``problem`` directly.

        The others never see such budgets: `solvers.paired_budgets` prices or linearises them.
        """
        return self.native_use_pairs

    def at_prices(self) -> "Solver":
        """Return the solver that runs at the prices of budgets with pair terms, by default this one."""
        return self

    def prover(self) -> "Solver | None":
        """Return an exact solver that gets a turn on the linear statement of pair terms in budgets, if there is one."""
        return None

    def require(self, problem: Problem) -> None:
        """Check that this back end can run on ``problem``.

        Raises:
            SolverUnavailableError: a package is missing.
            UnsupportedProblemError: the back end does not support this kind or size of problem.
        """
        if why := self.why_not():
            raise SolverUnavailableError(why)
        stated = ""
        if problem.paired_budgets and not self.takes_use_pairs(problem):
            stated = self._priced(problem.paired_budgets)
            problem = priced(problem, dict.fromkeys(problem.paired_budgets, 1.0)).problem
        if why := self.refuse(problem):
            raise UnsupportedProblemError(stated + why)

    def require_kind(self, *, pairs: bool, paired_budgets: Sequence[str] = ()) -> None:
        """Check what can be known before there is a problem, which may take hours to measure.

        Args:
            pairs: whether its objective will have pair terms.
            paired_budgets: resources whose budgets will have pair terms.

        Raises:
            SolverUnavailableError: a package is missing.
            SolverError: the credentials of a service are missing (see `require_access`).
            UnsupportedProblemError: the back end does not support this kind of problem.
        """
        if why := self.why_not():
            raise SolverUnavailableError(why)
        self.require_access()
        stated = self._priced(paired_budgets) if paired_budgets and not self.native_use_pairs else ""
        if why := self.refuse_kind(pairs=pairs or bool(stated)):
            raise UnsupportedProblemError(stated + why)

    def _priced(self, paired_budgets: Sequence[str]) -> str:
        """Say that budgets with pair terms are priced.

        Raises:
            UnsupportedProblemError: this back end cannot be called for many prices.
        """
        budgets = ", ".join(paired_budgets)
        if self.needs_network:
            raise UnsupportedProblemError(
                f"solver {self.name!r} takes no pair terms in a budget ({budgets}): it would be called for many "
                "prices; use 'auto', 'anneal', 'ga', 'lagrangian' or 'brute-force'"
            )
        return f"the budget for {budgets} has pair terms, which are priced into the objective, and "

    @classmethod
    def why_not(cls) -> str:
        """Say which packages are missing to use this back end, or return an empty string. Imports nothing."""
        missing = [module for module in cls.requires if importlib.util.find_spec(module.split(".")[0]) is None]
        if not missing:
            return ""
        package = f"qcompress[{cls.extra}]" if cls.extra else "qcompress"
        return f"solver {cls.name!r} needs {', '.join(missing)}: pip install '{package}'"

    @classmethod
    def info(cls) -> SolverInfo:
        """Describe the back end."""
        why_not = cls.why_not()
        return SolverInfo(
            name=cls.name,
            summary=cls.summary,
            available=not why_not,
            why_not=why_not,
            exact=cls.exact,
            native_constraints=cls.native_constraints,
            native_pairs=cls.native_pairs,
            needs_network=cls.needs_network,
            options=cls.option_defaults(),
        )

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Return option name → default."""
        return {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """Name of the solver, with the options that differ from their defaults."""
        defaults = self.option_defaults()
        changed = [f"{name}={value!r}" for name, value in self.option_values.items() if value != defaults[name]]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    @property
    def option_values(self) -> dict[str, Any]:
        """Return option name → value in this instance."""
        return {name: getattr(self, name) for name in self.option_defaults()}


class BqmSampler(Protocol):
    """A dimod sampler or composite, which samples binary quadratic models."""

    parameters: Any

    def sample(self, bqm: Any, **parameters: Any) -> Any:
        """Sample the model and return a ``dimod.SampleSet``."""


class CqmSampler(Protocol):
    """A sampler of constrained quadratic models."""

    def sample_cqm(self, cqm: Any, **parameters: Any) -> Any:
        """Sample the model and return a ``dimod.SampleSet``."""


SolverLike = str | Solver | type[Solver] | BqmSampler | CqmSampler
"""Everything accepted as a solver: a text (`solvers.solver_text`), a `Solver` class or instance, or a dimod sampler."""
