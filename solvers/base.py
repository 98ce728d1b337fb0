"""The contract between `solve` and a back end.

A back end is a frozen dataclass derived from `Solver`: its fields are its options (so they can be listed, checked
and pickled), its class attributes say what it can do, and its one method `run(problem, search)` does the work.

The back end never judges itself. It hands choices to ``search.offer`` and proven lower bounds to
``search.raise_bound``; `solvers.search.Search` has every choice judged by `Problem.evaluate`, keeps the incumbent, the
trace and the clock, and alone decides the status. What a back end sees is a problem whose objective numbers are scaled
to about 1, and usually a part of the stated one; what it finds is carried back for it.
"""

import dataclasses
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from formulations import Problem
from formulations.reductions.pricing import priced
from solvers.errors import InvalidOptionError, SolverUnavailableError, UnsupportedProblemError
from solvers.search import OnProgress, Progress, Search
from solvers.solution import relative_gap
from solvers.sub_search import SubSearch

__all__ = ["OnProgress", "Progress", "Search", "Solver", "SolverInfo", "SolverLike", "SubSearch", "relative_gap"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverInfo:
    """What a back end is and can do; ``options`` maps each option to its default."""

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
    """One back end. Subclasses are frozen dataclasses; their fields are their options and all have defaults."""

    name: ClassVar[str]
    summary: ClassVar[str]
    exact: ClassVar[bool] = False  # proves optimality when given the time
    native_constraints: ClassVar[bool] = True  # takes budgets as they are (no penalty)
    native_pairs: ClassVar[bool] = True  # takes pair terms
    native_use_pairs: ClassVar[bool] = False  # takes pair terms in budgets as they are; others work at prices
    needs_network: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True  # same seed, same answer when no time limit cuts it
    honours_time_limit: ClassVar[bool] = True  # ends in time; False only where foreign code cannot be stopped
    presolved: ClassVar[bool] = True  # may see the problem reduced; False where it must see it as it was stated
    requires: ClassVar[tuple[str, ...]] = ()  # modules it imports when it runs
    extra: ClassVar[str] = ""  # what installs them: pip install 'qcompress[extra]'
    minima: ClassVar[Mapping[str, float]] = {}  # option → its least value (None, where it is the default, is taken)
    words: ClassVar[Mapping[str, Collection[str]]] = {}  # option → the words that it may be

    def __post_init__(self) -> None:
        """Refuse values that options cannot take.

        Raises:
            InvalidOptionError: a number below its minimum, or a word that the option does not know.
        """
        for option, least in self.minima.items():
            value = getattr(self, option)
            if value is not None and not value >= least:
                raise InvalidOptionError(f"option {option!r} of {self.name!r} must be at least {least}, found {value}")
        for option, known in self.words.items():
            if (value := getattr(self, option)) not in known:
                raise InvalidOptionError(
                    f"option {option!r} of {self.name!r} knows {', '.join(known)}, found {value!r}"
                )

    @abstractmethod
    def run(self, problem: Problem, search: "Search") -> None:
        """Search ``problem`` until done or ``search.expired()``, telling ``search`` what is found."""

    def submit(self, problem: Problem, *, time_limit: float | None = None) -> Any:  # noqa: ARG002
        """Send ``problem`` to a service and return its job at once; only for services (see `solvers.leap`).

        Raises:
            InvalidOptionError: the back end runs on this machine.
        """
        raise InvalidOptionError(f"solver {self.name!r} runs here and has no jobs; wait=False is for the leap solvers")

    def prepare(self) -> None:  # noqa: B027 - most back ends have nothing to prepare
        """Compile or load what a run needs. `solve` calls it before the clock starts."""

    def refuse(self, problem: Problem) -> str:
        """Say why this back end cannot take ``problem``, and which can; an empty string where it can."""
        if problem.pairs and not self.native_pairs:
            return (
                f"solver {self.name!r} takes no pair terms; use 'auto', 'anneal' or 'milp', "
                "or formulate with pairs=False"
            )
        return ""

    def require(self, problem: Problem) -> None:
        """Raise what keeps this back end from running on ``problem``.

        Raises:
            SolverUnavailableError: a package is missing.
            UnsupportedProblemError: this kind or size of problem is beyond it.
        """
        if why := self.why_not():
            raise SolverUnavailableError(why)
        stated = ""
        if problem.paired_budgets and not self.native_use_pairs:
            budgets = ", ".join(problem.paired_budgets)
            if self.needs_network:
                raise UnsupportedProblemError(
                    f"solver {self.name!r} takes no pair terms in a budget ({budgets}): it would be called for many "
                    "prices; use 'auto', 'anneal', 'ga', 'lagrangian' or 'brute-force'"
                )
            stated = f"the budget for {budgets} has pair terms, which come into the objective at a price, and "
            problem = priced(problem, dict.fromkeys(problem.paired_budgets, 1.0)).problem
        if why := self.refuse(problem):
            raise UnsupportedProblemError(stated + why)

    @classmethod
    def why_not(cls) -> str:
        """Say what is missing to use this back end; an empty string when nothing is. Imports nothing."""
        missing = [module for module in cls.requires if importlib.util.find_spec(module.split(".")[0]) is None]
        if not missing:
            return ""
        package = f"qcompress[{cls.extra}]" if cls.extra else "qcompress"
        return f"solver {cls.name!r} needs {', '.join(missing)}: pip install '{package}'"

    @classmethod
    def info(cls) -> SolverInfo:
        """The back end's description."""
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
        """Option name → default."""
        return {field.name: field.default for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """The solver's name, with the options that differ from their defaults."""
        defaults = self.option_defaults()
        changed = [f"{name}={value!r}" for name, value in self.option_values.items() if value != defaults[name]]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    @property
    def option_values(self) -> dict[str, Any]:
        """Option name → this instance's value."""
        return {name: getattr(self, name) for name in self.option_defaults()}


class BqmSampler(Protocol):
    """A dimod sampler or composite: it samples binary quadratic models."""

    parameters: Any

    def sample(self, bqm: Any, **parameters: Any) -> Any:
        """Samples of the model, as a ``dimod.SampleSet``."""


class CqmSampler(Protocol):
    """A sampler of constrained quadratic models."""

    def sample_cqm(self, cqm: Any, **parameters: Any) -> Any:
        """Samples of the model, as a ``dimod.SampleSet``."""


SolverLike = str | Solver | type[Solver] | BqmSampler | CqmSampler
"""What is taken for a solver: words as in `solvers.named`, a `Solver` class or instance, or a dimod sampler."""
