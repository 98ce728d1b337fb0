"""The QUBO route shared by every sampler: price the budgets, sample, decode, repair, polish; each step reported apart.

A budget enters the model as a price per unit (a Lagrange multiplier), which keeps it sparse; the price is bisected,
round by round: up after the best sample went over the budget, down after it stayed within. The penalty on groups
begins at what is proven sufficient (see `formulations.bqm`) and is halved while nearly all samples are valid, since
a penalty larger than needed freezes an annealer; decode takes any sample, so a penalty too small costs nothing but
quality. What always holds: what is offered went through decode and, where needed, `repair`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from formulations.bqm import EncodedBqm, pair_couplings, to_bqm
from solvers.base import Search
from solvers.local_search import polish_flat
from solvers.moves import Arrays, Floats, Integers, judge_all, to_arrays
from solvers.repair import repair_flat

POLISHED = 3
"""Repaired samples of a round that are polished, best first."""

POLISH_PASSES = 20

ENOUGH_VALID = 0.9
"""Share of valid samples above which the penalty is halved; below half of it, it is doubled."""

SampleRound = Callable[[EncodedBqm], Any]
"""A sampler's call: the encoded model in, a ``dimod.SampleSet`` out."""


@dataclass
class Quality:
    """What the samples were worth before and after each step; objectives scaled, None while there is none."""

    raw: float | None = None  # valid (one option a group) and within the budgets as sampled
    decoded: float | None = None  # within the budgets after decode
    repaired: float | None = None
    polished: float | None = None
    samples: int = 0
    valid: int = 0
    feasible_raw: int = 0
    feasible_decoded: int = 0
    failed: int = 0  # repair found nothing

    def details(self, search: Search) -> dict[str, Any]:
        """For `Search.details`, in the problem's own unit."""
        shares = {"valid": self.valid, "feasible_raw": self.feasible_raw, "feasible_decoded": self.feasible_decoded}
        found = {"raw": self.raw, "decoded": self.decoded, "repaired": self.repaired, "polished": self.polished}
        return (
            {f"objective_{name}": None if value is None else search.unscaled(value) for name, value in found.items()}
            | {f"share_{name}": count / self.samples if self.samples else 0.0 for name, count in shares.items()}
            | {"samples": self.samples, "repair_failed": self.failed}
        )


@dataclass
class Improver:
    """Takes decoded samples to feasible, polished choices, offers them and keeps the books."""

    problem: Problem
    search: Search
    arrays: Arrays
    quality: Quality = field(default_factory=Quality)

    def take(self, choices: Integers, valid: NDArray[np.bool_] | None = None) -> None:
        """Choices ``(n, G)``, best samples first, and which of them came from valid samples (None: all)."""
        quality, a = self.quality, self.arrays
        chosen = choices + self.problem.group_offsets[:-1]
        values, excess = judge_all(a, chosen)
        values = values + self.problem.offset
        is_valid = np.ones(len(chosen), dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
        fits = excess == 0
        quality.samples += len(chosen)
        quality.valid += int(is_valid.sum())
        quality.feasible_raw += int((is_valid & fits).sum())
        quality.feasible_decoded += int(fits.sum())
        quality.raw = _least(quality.raw, values[is_valid & fits])
        quality.decoded = _least(quality.decoded, values[fits])
        repaired = []
        for one in np.unique(chosen, axis=0):
            if repair_flat(a, one):
                repaired.append(one)
            else:
                quality.failed += 1
            if self.search.expired():
                break
        if not repaired:
            return
        values = judge_all(a, np.stack(repaired))[0] + self.problem.offset
        quality.repaired = _least(quality.repaired, values)
        order = np.argsort(values, kind="stable")
        self._offer(repaired[order[0]])
        for at in order[:POLISHED]:
            if self.search.expired():
                break
            polish_flat(a, repaired[at], POLISH_PASSES)
            quality.polished = _least(quality.polished, judge_all(a, repaired[at][None])[0] + self.problem.offset)
            self._offer(repaired[at])

    def _offer(self, chosen: Integers) -> None:
        self.search.offer(chosen - self.problem.group_offsets[:-1])


def sample_rounds(problem: Problem, search: Search, sample: SampleRound, rounds: int, encoding: str) -> None:
    """Sample ``problem`` in rounds, each with better prices and penalties; fills ``search.details``.

    Args:
        problem: what to solve.
        search: gets the choices.
        sample: called once a round.
        rounds: how many, unless time is up.
        encoding: of `to_bqm`.
    """
    improver = Improver(problem, search, to_arrays(problem))
    if problem.num_options == problem.num_groups:  # nothing to sample: a domain-wall model would have no variable
        improver.take(np.zeros((1, problem.num_groups), dtype=np.int64))
        return
    prices, strength = _Prices(problem), 1.0
    with search.phase("build_s"):
        couplings = pair_couplings(problem)
    for done in range(rounds):
        with search.phase("build_s"):
            asked = prices.current()
            encoded = to_bqm(problem, encoding, prices=asked, strength=strength, couplings=couplings)
        with search.phase("solve_s"):
            found = sample(encoded)
            columns = [found.variables.index(v) for v in encoded.bqm.variables]
            order = np.argsort(found.record.energy, kind="stable")
            states = found.record.sample[np.ix_(order, columns)]
        with search.phase("decode_s"):
            choices, valid = encoded.decode_all(states), encoded.valid(states)
            improver.take(choices, valid)
        usage = problem.evaluate(choices[0]).usage
        prices.learn({name: usage[name] > budget for name, budget in problem.budgets.items()})
        if valid.mean() >= ENOUGH_VALID:
            strength /= 2
        elif valid.mean() < 0.5 * ENOUGH_VALID:
            strength = min(1.0, 2 * strength)
        search.details |= improver.quality.details(search) | {"rounds": done + 1, "strength": strength}
        search.details["prices"] = {name: search.unscaled(price) for name, price in asked.items()}
        if search.expired():
            break


class _Prices:
    """A price for every budget, bisected on a logarithmic scale between one too low and one high enough."""

    def __init__(self, problem: Problem) -> None:
        starts = problem.group_offsets[:-1]

        def spread(numbers: Floats) -> float:
            return float((np.maximum.reduceat(numbers, starts) - np.minimum.reduceat(numbers, starts)).sum())

        self.bracket = dict.fromkeys(problem.budgets, (0.0, np.inf))
        worth = spread(problem.cost) or 1.0
        self.price = {name: worth / (spread(problem.resources[name]) or 1.0) for name in problem.budgets}

    def current(self) -> dict[str, float]:
        return dict(self.price)

    def learn(self, over: dict[str, bool]) -> None:
        for name, price in self.price.items():
            low, high = self.bracket[name]
            low, high = (price, high) if over[name] else (low, price)
            self.bracket[name] = low, high
            if np.isinf(high):
                self.price[name] = 4 * low
            else:
                self.price[name] = float(np.sqrt(low * high)) if low > 0 else high / 4


def _least(known: float | None, values: Floats) -> float | None:
    if not len(values):
        return known
    return float(values.min()) if known is None else min(known, float(values.min()))
