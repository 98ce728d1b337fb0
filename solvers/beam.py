"""Beam search for an objective that is measured, not tabulated: a loss after fine-tuning, a latency on the device.

The search goes from the loosest choice to the budgets in levels, each a fraction of the way. A level's choices are made
from those of the previous level by switching one group deliberately. If a choice is still above the level, the cheapest
switches lower it (`solvers.kernels.repair`), so that only choices of about equal use are compared. The objective of the
problem, a cheap prediction, decides which choices to measure: the expected loss of a choice is the measured loss of its
parent plus the predicted difference. The prediction is corrected, option by option, by the measurements. At the budgets
the search continues from the best choices until no switch improves them. (Beam search over rank vectors scored by a
true loss is known from low-rank compression; here a model of the loss orders the measurements.)

The result is always feasible, no choice is measured twice, the number of measurements is bounded, and the same input
gives the same result.
"""

import itertools
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike

from formulations import Problem
from solvers.base import Search, Solver
from solvers.bounds.duality import dual_bound
from solvers.bounds.warm import warm_bounds
from solvers.errors import InvalidOptionError
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Arrays, Floats, Integers, begin, delta, judge_all, to_arrays
from solvers.kernels.repair import repair_flat
from solvers.validation import require_problem

Measure = Callable[[Integers], float]
"""Function choice ``(G,)`` → loss. NaN counts as infinite: such a choice is never kept."""

Scored = tuple[float, Integers]
"""A measured loss, and the flat options of the choice."""

LEARN, RIDGE, EXACT = 1000, 0.01, 1e-9
"""Number of latest measurements that correct the prediction; ridge parameter, relative to the number of groups; and
relative difference between measurement and prediction up to which nothing is corrected."""

PRICING_S, PRICING_SHARE = 1.0, 0.2
"""Maximum time in seconds for the prices of the budgets, which rank the switches, and maximum fraction of a run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamStep:
    """State of a search after a level, as passed to ``on_progress`` of `beam_search`.

    Attributes:
        level: number of the level, from 1; numbers above ``levels`` are rounds at the budgets.
        measurements: number of calls of ``measure`` so far, without losses from the cache.
        loss: the best measured loss of this level's choices.
        best: the best measured loss of a feasible choice, or None before there is one.
    """

    level: int
    measurements: int
    loss: float
    best: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BeamResult:
    """Result of a beam search.

    Attributes:
        choice: ``(G,)`` the feasible choice with the smallest measured loss, or None when none was measured.
        loss: measured loss of this choice.
        measurements: number of calls of ``measure``.
        cached: number of choices whose loss was in the cache.
        complete: whether the search finished (and was not ended by ``max_measurements`` or ``stop``).
        steps: one entry per level.
    """

    choice: Integers | None
    loss: float
    measurements: int
    cached: int
    complete: bool
    steps: tuple[BeamStep, ...]


def beam_search(
    problem: Problem,
    measure: Measure,
    *,
    width: int = 4,
    branch: int = 8,
    levels: int = 8,
    max_measurements: int = 1000,
    start: ArrayLike | None = None,
    cache: MutableMapping[str, float] | None = None,
    on_progress: Callable[[BeamStep], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> BeamResult:
    """Search for the feasible choice with the smallest measured loss.

    Args:
        problem: groups, options, budgets, and an objective that predicts the loss.
        measure: function choice ``(G,)`` → loss, which may take any time. An exception in it ends the search; with a
            ``cache`` no measurement is lost.
        width: number of choices kept per level.
        branch: number of choices measured per level for each kept one, or fewer if this would use up half of
            ``max_measurements`` before the budgets are reached.
        levels: number of steps from the loosest choice to the budgets.
        max_measurements: maximum number of calls of ``measure``.
        start: ``(G,)`` an additional choice to measure first; kept only if it is feasible.
        cache: mutable mapping from text to number. Known losses are read from it and new ones written to it, so that an
            interrupted search resumes when called again with the same cache.
        on_progress: function called after every level.
        stop: function called before every measurement; if it returns True, the search ends.

    Returns:
        The best choice, its loss and statistics of the search.

    Raises:
        InfeasibleBudgetError: a budget lies below the smallest possible use.
        InvalidOptionError: a number that must be at least 1 is smaller.

    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> losses = {(0, 0): 0.1, (1, 0): 0.2, (0, 1): 0.5, (1, 1): 0.9}
    >>> result = beam_search(problem, lambda choice: losses[tuple(choice.tolist())])
    >>> result.choice.tolist(), result.loss, result.measurements
    ([1, 0], 0.2, 4)
    """
    require_problem(problem, "beam_search")
    sizes = {"width": width, "branch": branch, "levels": levels, "max_measurements": max_measurements}
    for option, value in sizes.items():
        _at_least_one(option, value)
    problem.require_reachable_budgets()
    losses = _Losses(problem, measure, {} if cache is None else cache, max_measurements, stop)
    return _searched(problem, losses, _Space(problem, stop, PRICING_S), sizes, start, on_progress)


def _searched(
    problem: Problem,
    losses: "_Losses",
    space: "_Space",
    sizes: Mapping[str, int],
    start: ArrayLike | None,
    on_progress: Callable[[BeamStep], None] | None = None,
) -> BeamResult:
    """Search with the given numbers of `beam_search`."""
    width, branch, levels, max_measurements = (
        sizes[name] for name in ("width", "branch", "levels", "max_measurements")
    )
    losses.of([] if start is None else [problem.flat(start)])
    losses.of(space.lowered([space.loosest], 1.0))  # gives a feasible result from the start
    beam = losses.of([space.loosest])
    steps: list[BeamStep] = []
    switches, count = 2 * branch, max(1, min(width * branch, max_measurements // (2 * levels)))
    for level in itertools.count(1):
        earlier = beam if level > levels else []  # at the budgets parents compete with their children
        children = space.children(beam, min(1.0, level / levels), switches, count, losses)
        if earlier and not children and switches >= problem.num_options:
            break
        beam = losses.of([chosen for _, chosen in earlier] + children)[:width]
        if not beam or losses.cut:
            break
        space.learn(losses)
        best = losses.least if losses.best is not None else None
        steps.append(BeamStep(level=level, measurements=losses.calls, loss=beam[0][0], best=best))
        if on_progress is not None:
            on_progress(steps[-1])
        if earlier:
            switches = 2 * branch if beam[0][0] < earlier[0][0] else 2 * switches
    return BeamResult(
        choice=losses.best,
        loss=losses.least,
        measurements=losses.calls,
        cached=losses.cached,
        complete=not losses.cut,
        steps=tuple(steps),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam(Solver):
    """Beam search with the problem's own objective as the measure.

    Attributes:
        width, branch, levels: same as in `beam_search`.

    >>> from solvers import solve
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> solve(problem, "beam").choice.tolist()
    [0, 1]
    """

    name: ClassVar[str] = "beam"
    summary: ClassVar[str] = (
        "beam search from the loosest choice to the budgets; beam_search takes a measured objective"
    )
    minima: ClassVar[Mapping[str, int]] = {"width": 1, "branch": 1, "levels": 1}
    width: int = 8
    branch: int = 16
    levels: int = 16

    def prepare(self) -> None:
        """Compile the inner loops."""
        warm_bounds()
        problem = Problem(["a"], [["x", "y"]], [0, 1], {"bytes": [2, 1]}, {"bytes": 1})
        beam_search(problem, lambda choice: problem.evaluate(choice).objective)

    def run(self, problem: Problem, search: Search) -> None:
        """Search, and report every choice that is the best so far."""

        def measure(choice: Integers) -> float:
            judged = problem.evaluate(choice)
            if judged.feasible and (search.objective is None or judged.objective < search.objective):
                search.offer(choice)
            return judged.objective

        losses = _Losses(problem, measure, {}, most := 2**62, search.expired)
        space = _Space(problem, search.expired, min(PRICING_S, PRICING_SHARE * search.remaining()))
        result = _searched(problem, losses, space, {**self.option_values, "max_measurements": most}, search.initial)
        search.details |= {"measurements": result.measurements, "levels": len(result.steps)}


class _Losses:
    """Measure choices, each only once, and keep the best feasible one."""

    def __init__(
        self, problem: Problem, measure: Measure, cache: MutableMapping[str, float], most: int, stop: Callable[[], bool]
    ) -> None:
        self._problem, self._measure, self._cache, self._most, self._stop = problem, measure, cache, most, stop
        self.seen: dict[bytes, Scored] = {}  # in the order of measurement
        self.calls = self.cached = 0
        self.cut = False
        self.least = np.inf
        self.best: Integers | None = None

    def of(self, flats: list[Integers]) -> list[Scored]:
        """Return distinct choices with their losses, best first, as many as measurements are left for."""
        scored: dict[bytes, Scored] = {}
        for flat in flats:
            if flat.tobytes() not in self.seen and not self._look(flat):
                break
            scored.setdefault(flat.tobytes(), self.seen[flat.tobytes()])
        return sorted(scored.values(), key=lambda entry: entry[0])

    def _look(self, flat: Integers) -> bool:
        choice = flat - self._problem.group_offsets[:-1]
        key = ",".join(map(str, choice.tolist()))
        if key in self._cache:
            loss = float(self._cache[key])
            self.cached += 1
        elif self.calls >= self._most or self._stop():
            self.cut = True
            return False
        else:
            choice.flags.writeable = False
            loss = self._cache[key] = float(self._measure(choice))
            self.calls += 1
        loss = np.inf if np.isnan(loss) else loss
        self.seen[flat.tobytes()] = (loss, flat)
        if loss < self.least and self._problem.evaluate(choice).feasible:
            self.least, self.best = loss, choice
        return True


class _Space:
    """The search space between the loosest choice and the budgets."""

    def __init__(self, problem: Problem, stop: Callable[[], bool], pricing_s: float) -> None:
        self._stated, self._stop = to_arrays(problem), stop
        self._arrays = self._stated
        a = self._arrays
        use = (a.use / a.unit).sum(axis=1)
        self.loosest = np.lexsort((a.cost, -use, a.group_of))[a.starts[:-1]]  # largest use; on ties the cheapest
        self._most = np.maximum(a.use[self.loosest].sum(axis=0), a.limit)
        prices = dual_bound(problem, time_limit=pricing_s).prices
        self._price = np.array([prices[name] for name in problem.budgets])

    def learn(self, losses: "_Losses") -> None:
        """Correct the options' costs by the differences of measured and predicted losses (ridge regression)."""
        measured = [scored for scored in losses.seen.values() if np.isfinite(scored[0])][-LEARN:]
        if not measured:
            return
        flats = np.stack([flat for _, flat in measured])
        predicted, _ = judge_all(self._stated, flats)
        missing = np.array([loss for loss, _ in measured]) - predicted
        missing -= missing.mean()
        if np.abs(missing).max() <= EXACT * (np.abs(predicted).max() + np.ptp(predicted)):
            return
        shape = (len(flats), len(self._stated.cost))
        ends = np.arange(0, flats.size + 1, flats.shape[1])
        chosen = scipy.sparse.csr_array((np.ones(flats.size), flats.ravel(), ends), shape=shape)
        common = (chosen @ chosen.T).toarray() + RIDGE * flats.shape[1] * np.eye(len(flats))
        self._arrays = self._stated._replace(cost=self._stated.cost + chosen.T @ np.linalg.solve(common, missing))

    def lowered(self, flats: list[Integers], share: float) -> list[Integers]:
        """Lower each choice to ``share`` of the way to the budgets; leave out choices for which this fails."""
        a = self._arrays._replace(limit=share * self._arrays.limit + (1.0 - share) * self._most)
        lowered = []
        for flat in flats:
            if self._stop():
                break
            attempt = flat.copy()
            if repair_flat(a, attempt, self._stop):
                lowered.append(attempt)
        return lowered

    def children(
        self, beam: list[Scored], share: float, switches: int, count: int, losses: "_Losses"
    ) -> list[Integers]:
        """Return up to ``count`` new choices of smallest expected loss, at ``share`` of the way to the budgets."""
        expected: dict[bytes, tuple[float, Integers]] = {}
        for loss, parent in beam:
            value = _lagrangian_changes(self._arrays, parent, self._price)
            tries = [parent]
            for new in np.argsort(value, kind="stable")[: min(switches, int(np.isfinite(value).sum()))]:
                switched = parent.copy()
                switched[self._arrays.group_of[new]] = new
                tries.append(switched)
            children = self.lowered(tries, share)
            predicted, _ = judge_all(self._arrays, np.stack([parent, *children]))
            for child, difference in zip(children, predicted[1:] - predicted[0], strict=True):
                key = child.tobytes()
                if key not in losses.seen:
                    scored = (float(loss + difference), child)
                    expected[key] = min(scored, expected.get(key, scored), key=lambda entry: entry[0])
        return [child for _, child in sorted(expected.values(), key=lambda entry: entry[0])[:count]]


@compiled
def _lagrangian_changes(a: Arrays, chosen: Integers, price: Floats) -> Floats:
    """Return the change ``(V,)`` in priced objective from switching to each option; infinite for the chosen ones."""
    total, field, _ = begin(a, chosen)
    changes = np.empty(len(a.cost))
    for v in range(len(a.cost)):
        old = chosen[a.group_of[v]]
        changes[v] = np.inf if v == old else delta(a, total, field, old, v)
        for k in range(len(price)):
            changes[v] += price[k] * (a.use[v, k] - a.use[old, k])
    return changes


def _at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise InvalidOptionError(f"option {option!r} of a beam search must be at least 1, found {value}")
