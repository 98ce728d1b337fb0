"""Annealing in the space of choices, with recombination of chains (a memetic search).

A population of choices is cooled from random starts. Then, generation after generation, two of them are crossed
(`solvers.heuristic.recombination`). The child is cooled from a low temperature, at which it keeps the options that
its parents share and settles the others. Chains run in threads in lockstep: all of them advance by a chunk of moves,
then results are collected in a fixed order. Reported choices are within every budget. The temperatures are derived from
the problem. The same seed gives the same result on any number of cores, unless a time limit ends the run.
"""

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from formulations import Problem
from solvers.base import Search, Solver
from solvers.heuristic.recombination import REHEAT, AnnealingChain, Breeding, distinct
from solvers.kernels.cooling import NO_BEST, Schedule
from solvers.kernels.local_search import polish_flat
from solvers.kernels.moves import Arrays, Floats, Integers, begin, delta, fits, to_arrays
from solvers.kernels.repair import repair_flat
from solvers.kernels.warm import warm

CHUNK = 100_000
"""Number of moves between two checks of the clock (about 10 ms)."""

UNLIMITED_CHUNK = 1_000_000
"""The same in a problem without budgets, whose moves are faster."""

LEAST_MOVES = 20_000
"""Minimum number of moves of a cooling; small problems take little time and are searched more thoroughly."""

CHILDREN = 4
"""Number of children in a generation, which are cooled at the same time."""

UNLIMITED_HEAT = 0.5
"""First temperature in a problem without budgets, relative to that in others."""

POLISHABLE = 6000
"""Maximum number of options for which choices are also polished (a few hundredths of a second)."""

PATIENCE = 10
"""Number of generations without a better choice after which the search ends."""


@dataclass(frozen=True)
class Anneal(Solver):
    """Simulated annealing by switches of one or two groups, with recombination.

    Attributes:
        sweeps: number of moves per group for cooling a random start (a quarter for a child); fewer if time is short.
        population: number of choices that are kept and recombined.
        generations: maximum number of rounds of recombination; the search ends earlier if they bring no improvement.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solve(layered_problem(20, seed=1), "anneal", seed=0, sweeps=200).feasible
    True
    """

    name: ClassVar[str] = "anneal"
    summary: ClassVar[str] = "annealing inside the choice space, with recombination; any problem, any size"
    anneals_use_pairs: ClassVar[bool] = True
    minima: ClassVar[Mapping[str, int]] = {"sweeps": 1, "population": 1, "generations": 0}
    sweeps: int = 20_000
    population: int = 8
    generations: int = 60

    def prepare(self) -> None:
        """Compile the inner loops."""
        warm()

    def run(self, problem: Problem, search: Search) -> None:
        """Cool a population, then recombine it."""
        a = to_arrays(problem)
        free = np.flatnonzero(np.diff(a.starts) > 1)
        start, warm_start = _start(a, search)
        _offer(search, problem, [start] if start is not None else [])
        if not len(free) or search.expired():
            return
        fallback = problem.group_offsets[:-1].copy() if start is None else start
        hot, cold = _temperatures(a, fallback)
        price = hot / a.unit
        search.details |= {"hot": hot, "cold": cold}
        with search.phase("solve_s"), ThreadPoolExecutor(min(CHILDREN, os.cpu_count() or 1)) as threads:
            plan = _Plan(self, len(free), _moves_per_s(a, free, fallback, price, hot), search)
            herd = _Herd(problem, search, a, free, threads, cold)
            begins = [fallback if warm_start else _random_choice(a, search.rng) for _ in range(plan.population)]
            warm = hot * REHEAT if warm_start else hot
            elite = herd.cooled(
                [AnnealingChain(begin, price, search.rng) for begin in begins], warm, plan.steps, plan.share
            )
            idle, breeding = 0, Breeding(a, search.rng)
            for generation in range(self.generations if len(elite) > 1 else 0):
                if idle == PATIENCE or search.expired():
                    break
                kept = elite[: plan.population]
                children, heat = breeding.children(elite, CHILDREN)
                cooled = herd.cooled(children, hot * heat, plan.child_steps, 1.0)
                breeding.settle(cooled)
                elite = distinct(kept + cooled)[: plan.population]
                idle = idle + 1 if elite[0].value >= kept[0].value else 0
                _offer(search, problem, [elite[0].best] if not idle else [])
                search.details["generations"] = generation + 1
            _offer(search, problem, [_polished(a, chain.best) for chain in elite[:1] if chain.value < NO_BEST])


class _Plan:
    """The number of starts and of moves: as requested, or as many as the remaining time allows."""

    def __init__(self, options: Anneal, num_free: int, moves_per_s: float, search: Search) -> None:
        self.population, self.steps = options.population, max(LEAST_MOVES, options.sweeps * num_free)
        self.share = 0.4  # fraction of the remaining time; the rest is for recombination
        affordable = self.share * search.remaining() * moves_per_s
        if self.population * self.steps > affordable:
            self.population = min(self.population, max(2, int(affordable / self.steps)))  # slow cooling matters more
            self.steps = max(1, int(min(self.steps, affordable / self.population)))
            search.cut_short()
        self.child_steps = max(min(LEAST_MOVES, self.steps), self.steps // 4)


class _Herd:
    """Cool chains in lockstep, a chunk of moves at a time, and report their best choices."""

    def __init__(
        self, problem: Problem, search: Search, a: Arrays, free: Integers, threads: ThreadPoolExecutor, cold: float
    ) -> None:
        self.problem, self.search, self.a, self.free, self.threads, self.cold = problem, search, a, free, threads, cold

    def cooled(self, chains: list[AnnealingChain], hot: float, steps: int, share: float) -> list[AnnealingChain]:
        """Run ``steps`` moves of each chain and return the distinct ones, best first.

        If ``share`` of the remaining time is not enough, the chains cool faster, because a hot chain is worth little.
        """
        ratio = (self.cold / hot) ** (1.0 / steps)
        rate = min(0.1, max(0.01, 10.0 * len(self.free) / steps))
        chunk = max((CHUNK if len(self.a.limit) else UNLIMITED_CHUNK) // len(chains), len(self.free))
        record, begin, allowed, done = NO_BEST, self.search.elapsed(), share * self.search.remaining(), 0
        while done < steps and not self.search.expired():
            schedule = Schedule(hot * ratio**done, ratio, min(chunk, steps - done), rate)
            done = max(done + chunk, int(steps * min(1.0, (self.search.elapsed() - begin) / allowed)))
            list(self.threads.map(lambda chain, now=schedule: chain.advance(self.a, self.free, now), chains))
            leader = min(chains, key=lambda chain: chain.value)
            if leader.value < record:
                record = leader.value
                _offer(self.search, self.problem, [leader.best])
        return distinct(chains)


def _offer(search: Search, problem: Problem, chosen: list[Integers]) -> None:
    for flat in chosen:
        search.offer(flat - problem.group_offsets[:-1])


def _polished(a: Arrays, chosen: Integers) -> Integers:
    polished = chosen.copy()
    if len(a.cost) <= POLISHABLE:
        polish_flat(a, polished, 2)
    return polished


def _random_choice(a: Arrays, rng: np.random.Generator) -> Integers:
    return a.starts[:-1] + rng.integers(0, np.diff(a.starts))


def _start(a: Arrays, search: Search) -> tuple[Integers | None, bool]:
    """Return a feasible choice to start from, if repair finds one, and whether the caller gave it."""
    warm_start = search.initial is not None
    if search.initial is not None:
        chosen = a.starts[:-1] + search.initial
    else:
        cheapest = np.lexsort((a.cost, a.group_of))  # options by cost within each group
        chosen = cheapest[a.starts[:-1]]
    return (chosen, warm_start) if repair_flat(a, chosen, search.expired) else (None, warm_start)


def _temperatures(a: Arrays, chosen: Integers) -> tuple[float, float]:
    """Derive the first and last temperature from the effects of single switches at a local optimum.

    Half of the switches change the objective by less than the first temperature, and nearly all by much more than the
    last.
    """
    local = chosen
    total, field, usage = begin(a, local)
    if fits(a, usage):
        local = _polished(a, local)
        total, field, usage = begin(a, local)
    sample = np.unique(np.linspace(0, len(a.cost) - 1, 5000).astype(np.int64))
    changes = np.abs([delta(a, total, field, local[a.group_of[v]], v) for v in sample])
    changes = changes[changes > 1e-13 * (1.0 + changes.max())]
    if not len(changes):
        return 1.0, 1.0
    hot, low = np.quantile(changes, [0.5, 0.05])
    hot *= 1.0 if len(a.limit) else UNLIMITED_HEAT
    return float(hot), float(np.clip(0.3 * low, 1e-6 * hot, 0.1 * hot))


def _moves_per_s(a: Arrays, free: Integers, chosen: Integers, price: Floats, temperature: float) -> float:
    """Measure the number of moves per second, of all threads together, in a short run without side effects."""
    chain = AnnealingChain(chosen, price, np.random.default_rng(0))
    start = time.perf_counter()
    steps = max(20_000, len(free))  # enough to make the initial sums of a run negligible
    schedule = Schedule(temperature, 1.0, steps, 0.01)
    chain.advance(a, free, schedule)
    return steps / (time.perf_counter() - start) * min(CHILDREN, os.cpu_count() or 1)
