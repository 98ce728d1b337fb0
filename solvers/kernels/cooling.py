"""A compiled annealing run over choices, with switches of one or two groups and budgets enforced by prices.

A hard budget divides the search space: a large layer can only change after many small ones have freed enough budget,
one after the other. A chain may therefore exceed a budget and pays a price per unit for it. This exact penalty adapts
to the chain: the price rises while the chain is over budget and falls while it is within, so that the chain stays near
the boundary at every temperature (cf. strategic oscillation, doi:10.1111/j.1540-5915.1977.tb01074.x). The record
``best`` is within every budget, with uses summed afresh from the choice. The number of random draws does not depend on
which moves are accepted, so rounding cannot shift the random stream.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Arrays, Floats, Integers, begin, cross, delta, fits, objective, switch

PAIRED = 128
"""Fraction of the moves that switch two groups, in 256ths."""

NO_BEST = np.inf
"""Objective of a record without a choice."""


class Schedule(NamedTuple):
    """The temperatures of a run, and how quickly its prices change."""

    temperature: float  # temperature of the first move, in the objective's unit
    ratio: float  # ratio of the temperatures of consecutive moves
    steps: int  # number of moves
    rate: float  # relative change of a price per sweep (one move per free group)


@compiled
def draw(state: NDArray[np.uint64]) -> Any:
    """Draw 64 random bits (xorshift64*, Vigna, doi:10.1145/2845077)."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return x * np.uint64(2685821657736338717)


@compiled
def below(bits: np.uint64, bound: int) -> Any:
    """Compute a number below ``bound`` from the upper 32 of 64 random bits."""
    return np.int64(((bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@compiled
def other(a: Arrays, group: int, old: int, bits: np.uint64) -> Any:
    """Choose an option of ``group`` other than ``old``, from the lower 32 of 64 random bits."""
    start, count = a.starts[group], a.starts[group + 1] - a.starts[group]
    new = start + below(bits << np.uint64(32), count - 1)
    return new + 1 if new >= old else new


@compiled
def _filler(a: Arrays, usage: Floats, old1: int, new1: int, group: int, old2: int) -> int:
    """Return the other option of ``group`` that best fills the single budget after the switch to ``new1``; or -1."""
    room = max(a.limit[0], usage[0]) - (usage[0] + a.use[new1, 0] - a.use[old1, 0]) + a.use[old2, 0]
    most, new2 = -1.0, -1
    for v in range(a.starts[group], a.starts[group + 1]):
        if v != old2 and most < a.use[v, 0] <= room:
            most, new2 = a.use[v, 0], v
    return new2


@compiled
def _penalty(a: Arrays, usage: Floats, price: Floats, old1: int, new1: int, old2: int, new2: int) -> float:
    """Return the change in the price paid for excess."""
    change = 0.0
    for k in range(len(usage)):
        over = usage[k] - a.limit[k]
        after = over + a.use[new1, k] - a.use[old1, k] + a.use[new2, k] - a.use[old2, k]
        change += price[k] * (max(0.0, after) - max(0.0, over))
    return float(change)


@compiled
def cool(
    a: Arrays,
    free: Integers,
    chosen: Integers,
    price: Floats,
    state: NDArray[np.uint64],
    schedule: Schedule,
    best: Integers,
    best_value: float,
) -> float:
    """Anneal from ``chosen`` for ``schedule.steps`` moves; return the objective of the best choice so far.

    Args:
        a: the problem.
        free: groups with more than one option; at least one group.
        chosen: ``(G,)`` flat options, modified in place.
        price: ``(K,)`` prices per unit of excess, modified in place.
        state: ``(1,)`` state of the random number generator, not zero, modified in place.
        schedule: number of moves, temperatures and change of prices.
        best: ``(G,)`` the best feasible choice so far, modified in place.
        best_value: objective of ``best`` without offset, or `NO_BEST`.
    """
    temperature, ratio, steps, rate = schedule
    total, field, usage = begin(a, chosen)
    value = objective(a, chosen, field)
    num_budgets, num_free = len(a.limit), len(free)
    if value < best_value and fits(a, usage):
        best_value = value
        best[:] = chosen
    for step in range(steps):
        temperature *= ratio
        if step % num_free == 0:
            for k in range(num_budgets):
                price[k] *= 1.0 + rate if usage[k] > a.limit[k] else 1.0 / (1.0 + rate)
        first, second, third = draw(state), draw(state), draw(state)
        place1 = below(first, num_free)
        group1 = free[place1]
        old1 = chosen[group1]
        new1 = other(a, group1, old1, first)
        old2 = new2 = old1  # no second switch
        if num_free > 1 and (third & np.uint64(255)) < np.uint64(PAIRED):
            place2 = below(second, num_free - 1)
            group2 = free[place2 + 1 if place2 >= place1 else place2]
            old2 = chosen[group2]
            if num_budgets == 1:
                new2 = _filler(a, usage, old1, new1, group2, old2)
                if new2 < 0:
                    continue
            else:
                new2 = other(a, group2, old2, second)
        change = delta(a, total, field, old1, new1)
        if new2 != old2:
            change += delta(a, total, field, old2, new2) + cross(a, old1, new1, old2, new2)
        rise = change + _penalty(a, usage, price, old1, new1, old2, new2)
        uniform = (np.float64(third >> np.uint64(11)) + 0.5) * 2.0**-53
        if rise > 0.0 and rise > -temperature * np.log(uniform):
            continue
        switch(a, chosen, total, field, usage, new1)
        if new2 != old2:
            switch(a, chosen, total, field, usage, new2)
        value += change
        if value < best_value - 1e-12 * abs(value) and fits(a, usage) and _fits_anew(a, chosen):
            best_value = value
            best[:] = chosen
    return best_value


@compiled
def _fits_anew(a: Arrays, chosen: Integers) -> bool:
    """Whether every budget holds, with uses summed afresh (a running sum accumulates rounding errors)."""
    for k in range(len(a.limit)):
        usage = 0.0
        for v in chosen:
            usage += a.use[v, k]
        if usage > a.limit[k]:
            return False
    return True
