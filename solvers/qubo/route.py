"""The steps shared by all QUBO samplers: price the budgets, sample, decode, repair, polish, with a report on each step.

A budget enters the model as a price per unit (a Lagrange multiplier), which keeps the model sparse. The price is found
by bisection, round by round: it rises if the best sample was over the budget, and falls if it was within. The penalty
on groups starts at the proven sufficient value (see `formulations.forms.encodings`) and is halved for every group that
was valid in all samples of a round, because a larger penalty than needed freezes an annealer. Every sample can be
decoded, so a penalty that is too small only reduces the quality. All reported choices were decoded and, if necessary,
repaired (`repair`).

Building a model cannot be interrupted. Under a time limit, a part of a large problem is built and sampled first. If the
whole problem would take too long, it is not started, and ``details["not_sampled"]`` says so.
"""

import importlib
import itertools
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from formulations.forms.bqm import ENCODINGS, EncodedBqm, pair_couplings, to_bqm
from formulations.forms.couplings import MAX_PAIRS, count_couplings
from formulations.problem import limit_of
from formulations.reductions.restriction import part
from solvers.base import Search, Solver
from solvers.errors import SolverError
from solvers.kernels.moves import Floats, Integers, to_arrays
from solvers.kernels.warm import warm
from solvers.qubo.samples import Improver, states_of
from solvers.search import cheapest, num_choices

OFTEN_INVALID = 0.1
"""A group's penalty is doubled if more than this fraction of a round's samples is invalid in it."""

SHARE = 0.25
"""Maximum fraction of the remaining time for sampling in one round, so that prices are updated several times."""

CAUTION = 2.0
"""Factor by which a whole model may take longer than its parts suggest, because large arrays are slow and samples are
polished afterwards."""

FARTHEST = 1e12
"""Largest factor between a budget's first price and any other: beyond it, only the budget or only the costs count."""

SAMPLES_PER_CHOICE = 10
"""Samples for each choice that exists after which more time is of no use: listing all choices would be quicker."""

SampleRound = Callable[[EncodedBqm, float], Any]
"""Function that samples an encoded model within a time in seconds (0: as fast as possible, infinite: according to its
options) and returns a ``dimod.SampleSet``."""


@dataclass(frozen=True)
class QuboSolver(Solver):
    """Base class of back ends that sample the QUBO.

    Attributes:
        rounds: number of rounds of sampling, each with better prices of the budgets. None: as many as fit into the
            time limit, or a fixed number without one.
        encoding: name of the encoding, same as in `formulations.to_bqm`.
    """

    native_constraints: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ("dimod", "dwave.samplers")
    minima: ClassVar[Mapping[str, int]] = {"rounds": 1}
    words: ClassVar[Mapping[str, Collection[str]]] = {"encoding": ENCODINGS}
    small: ClassVar[int] = 100_000  # couplings of a model that is built and converted in a few hundredths of a second
    usual_rounds: ClassVar[int] = 12  # without a time limit; with one, rounds go on
    rounds: int | None = None
    encoding: str = "domain-wall"

    @abstractmethod
    def sampling(self, search: Search) -> SampleRound:
        """Return the function that samples the model of a round."""

    def prepare(self) -> None:
        """Compile the inner loops and import the sampler."""
        warm()
        for module in self.requires:
            importlib.import_module(module)

    def refuse(self, problem: Problem) -> str:
        """Refuse a problem whose factor would expand to too many couplings."""
        return refuse_too_many(self.name, problem)

    def run(self, problem: Problem, search: Search) -> None:
        """Sample, decode, repair, polish, round by round."""
        sample_rounds(
            problem,
            search,
            self.sampling(search),
            self.rounds,
            self.encoding,
            usual_rounds=self.usual_rounds,
            small=self.small,
        )


def refuse_too_many(name: str, problem: Problem) -> str:
    """Say why a QUBO of ``problem`` is too large, or return an empty string."""
    if (count := count_couplings(problem)) <= MAX_PAIRS:
        return ""
    return f"solver {name!r} would need a QUBO of {count:,} couplings, at most {MAX_PAIRS:,}; use 'auto' or 'anneal'"


def sample_rounds(
    problem: Problem,
    search: Search,
    sample: SampleRound,
    rounds: int | None,
    encoding: str,
    *,
    usual_rounds: int = QuboSolver.usual_rounds,
    trial: bool = True,
    small: int = QuboSolver.small,
) -> None:
    """Sample ``problem`` in rounds, each with better prices and penalties, and fill ``search.details``.

    Args:
        problem: the problem to solve.
        search: the search that gets the choices.
        sample: function called once per round, and for a trial.
        rounds: number of rounds, or fewer if the time is over. None: as many as fit into the time limit, with new
            random numbers each, or ``usual_rounds`` without a time limit or after far more samples than there are
            choices.
        encoding: name of the encoding, same as in `to_bqm`.
        usual_rounds: number of rounds without a time limit.
        trial: whether the sampler may be called on a part of the problem just to measure its duration.
        small: number of couplings of that part.
    """
    improver = Improver(problem, search, to_arrays(problem))
    if problem.num_options == problem.num_groups:  # nothing to sample; a domain-wall model would have no variable
        improver.take(np.zeros((1, problem.num_groups), dtype=np.int64))
        return
    prices, strength = _Prices(problem), np.ones(problem.num_groups)
    needed_s = _needed_s(problem, search, sample if trial else None, encoding, prices.current(), small)
    if needed_s > search.remaining():
        _stand_in(problem, search, improver, prices.current(), needed_s)
        return
    with search.phase("build_s"):
        couplings = pair_couplings(problem)
    round_s, most = 0.0, SAMPLES_PER_CHOICE * num_choices(problem)
    for done in itertools.count() if rounds is None else range(rounds):
        plenty = improver.quality.samples >= most
        if rounds is None and done >= usual_rounds and (plenty or _enough(search, round_s)):
            break
        begun = search.elapsed()
        with search.phase("build_s"):
            round_prices = prices.current()
            encoded = to_bqm(problem, encoding, prices=round_prices, strength=strength, couplings=couplings)
        built_s = search.elapsed() - begun
        with search.phase("solve_s"):
            try:
                states, _ = states_of(sample(encoded, SHARE * search.remaining()), encoded.bqm.variables)
            except Exception as error:  # samplers may raise anything
                search.recover(error)
                break
        if not len(states):
            if search.expired():
                break
            continue
        with search.phase("decode_s"):
            choices, valid = encoded.decode_all(states), encoded.valid_groups(states)
            improver.take(choices, np.asarray(valid.all(axis=1)))
        prices.learn(problem.evaluate(choices[0]).violations)
        improver.quality.tell(search)
        search.details |= {"rounds": done + 1}
        search.details["strength"] = {"least": float(strength.min()), "most": float(strength.max())}
        strength = _adapted(strength, valid)
        search.note(prices=round_prices)
        if search.expired():
            break
        round_s = search.elapsed() - begun
        if done + 1 != rounds and max(2 * built_s, needed_s) > search.remaining():  # building a model and converting it
            search.cut_short()
            break
    if not improver.quality.samples:
        search.recover(SolverError("the sampler returned no samples"))


def _enough(search: Search, round_s: float) -> bool:
    """Whether to stop after this round: no time limit, a proven answer, or no time for another round."""
    if np.isinf(search.remaining()) or search.proven():
        return True
    if round_s > search.remaining():
        search.cut_short()
        return True
    return False


def _stand_in(problem: Problem, search: Search, improver: Improver, prices: dict[str, float], needed_s: float) -> None:
    """Repair and polish the cheapest options, if the remaining time is too short for a single round."""
    why = f"a round would take at least {needed_s:.2g} s, {search.remaining():.2g} s are left"
    improver.quality.tell(search)
    search.details["rounds"] = 0
    search.details["not_sampled"] = f"{why}; the cheapest options at the first prices were repaired and polished"
    improver.stand_in(_cheapest(problem, prices))
    search.cut_short()


def _adapted(strength: Floats, valid: NDArray[np.bool_]) -> Floats:
    """Return penalties ``(G,)`` for the next round: halved if all samples were valid, doubled if many were not."""
    invalid = 1.0 - valid.mean(axis=0)
    relaxed = np.where(invalid == 0, strength / 2, strength)
    return np.where(invalid > OFTEN_INVALID, np.minimum(2 * relaxed, 1.0), relaxed)


def _needed_s(
    problem: Problem, search: Search, sample: SampleRound | None, encoding: str, prices: dict[str, float], small: int
) -> float:
    """Estimate the minimum time of a round in seconds from a part of the problem; 0 if small or without time limit."""
    if np.isinf(search.remaining()) or count_couplings(problem) <= small:
        return 0.0
    share = small / count_couplings(problem)
    part = _first_groups(problem, max(1, int((np.sqrt(share) if problem.pairs.rank else share) * problem.num_groups)))
    begun = time.perf_counter()
    encoded = to_bqm(part, encoding, prices=prices)
    if sample is not None and encoded.bqm.num_variables:
        before = search.rng.bit_generator.state
        sample(encoded, 0.0)
        search.rng.bit_generator.state = before
    whole_size, part_size = (count_couplings(model) + model.num_options for model in (problem, part))
    return CAUTION * whole_size / part_size * (time.perf_counter() - begun)


def _first_groups(problem: Problem, num_groups: int) -> Problem:
    """Return the problem of the first groups alone, with the same budgets."""
    return part(problem, np.arange(problem.group_offsets[num_groups]), problem.budgets)


class _Prices:
    """Prices of the budgets, found by bisection on a logarithmic scale, starting at the best prices for costs alone."""

    def __init__(self, problem: Problem) -> None:
        self.bracket = dict.fromkeys(problem.budgets, (0.0, np.inf))
        self.step = dict.fromkeys(problem.budgets, 2.0)
        self.price = {name: _alone(problem, name) for name in problem.budgets}
        self.ends = {name: (price / FARTHEST, price * FARTHEST) for name, price in self.price.items()}

    def current(self) -> dict[str, float]:
        return dict(self.price)

    def learn(self, over: Collection[str]) -> None:
        for name, price in self.price.items():
            low, high = self.bracket[name]
            low, high = self.bracket[name] = (price, high) if name in over else (low, price)
            if low > 0 and np.isfinite(high):
                self.price[name] = float(np.sqrt(low * high))
            else:
                far = low * self.step[name] if np.isinf(high) else high / self.step[name]
                self.price[name] = float(np.clip(far, *self.ends[name]))
                self.step[name] = min(self.step[name] ** 1.5, FARTHEST)


def _alone(problem: Problem, name: str) -> float:
    """Return the smallest price at which the cheapest options meet the budget ``name``, ignoring pair terms."""
    starts, use = problem.group_offsets[:-1], problem.resources[name]
    budget = limit_of(problem.budgets[name]) - problem.fixed.get(name, 0.0)

    def spread(numbers: Floats) -> float:
        return float((np.maximum.reduceat(numbers, starts) - np.minimum.reduceat(numbers, starts)).sum())

    middle = (spread(problem.cost) or 1.0) / (spread(use) or 1.0)
    low, high = 1e-9 * middle, 1e9 * middle
    for _ in range(50):
        price = float(np.sqrt(low * high))
        chosen = _cheapest(problem, {name: price}) + starts
        low, high = (price, high) if use[chosen].sum() > budget else (low, price)
    return high if 1e-6 * middle < high < 1e6 * middle else middle


def _cheapest(problem: Problem, prices: dict[str, float]) -> Integers:
    """Return every group's cheapest option ``(G,)`` at these prices, ignoring pair terms."""
    cost = sum((price * problem.resources[name] for name, price in prices.items()), np.array(problem.cost))
    return cheapest(problem, cost)


def paced(
    call: Callable[[int, int], Any], reads: int, sweeps: int, seconds: float, search: Search, trial_sweeps: int = 1
) -> Any:
    """Run ``call(reads, sweeps)`` with fewer reads or sweeps if needed to fit in ``seconds``.

    This is for samplers that cannot be interrupted. A short call measures the pace. If it reports its sampling time,
    that is used, without the conversion of the model.
    """
    if np.isinf(seconds):
        return call(reads, sweeps)
    begun, before = search.elapsed(), search.rng.bit_generator.state
    trial = call(1, min(sweeps, trial_sweeps))
    search.rng.bit_generator.state = before  # the samples are those of a run without a time limit
    wall_s = search.elapsed() - begun
    if seconds == 0 or search.remaining() < wall_s:  # no time to convert the model again
        return trial
    timing = trial.info.get("timing")
    trial_s = 1e-9 * timing["sampling_ns"] if timing else wall_s
    affordable = seconds / trial_s * min(sweeps, trial_sweeps)
    sweeps = max(1, min(sweeps, int(affordable)))
    return call(max(1, min(reads, int(affordable / sweeps))), sweeps)
