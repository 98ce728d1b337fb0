"""Annealing of choices whose budgets have pair terms, with the true uses: it finds what no price leads to.

Chains are cooled one after the other, by turns from random choices and from the best one so far. They may exceed a
budget at a price that adapts (`solvers.kernels.paired_cooling`).
"""

import itertools

import numpy as np

from solvers.kernels.cooling import NO_BEST, Schedule
from solvers.kernels.local_search import descend_flat
from solvers.kernels.moves import Arrays, Floats, Integers, begin, delta
from solvers.kernels.paired_cooling import cool_paired
from solvers.kernels.paired_uses import PairedUses, begin_uses, use_change
from solvers.search import Search

CHUNK = 20_000
"""Number of moves between two checks of the clock."""

SWEEPS, COOLINGS = 1_000, 4
"""Number of moves per group of the first two coolings, each further two twice as long; and the number of coolings
without a time limit, which is also the least that a time limit is divided into."""

REHEAT, COLDEST = 1 / 8, 1e-3
"""First temperature of a chain from the best choice, and last temperature, relative to the first from a random one."""

SAMPLE = 5_000
"""Number of switches by which the temperatures and prices are set."""


def anneal_paired(search: Search, a: Arrays, u: PairedUses) -> None:
    """Cool chains until the search's time limit, and report every improvement; without a limit, `COOLINGS` chains.

    Args:
        search: search of the problem; it may have no choice yet.
        a: the problem without budgets.
        u: uses and limits of its budgets.
    """
    free = np.flatnonzero(np.diff(a.starts) > 1)
    if not len(free):
        return
    hot, price = _scales(a, u, _random_choice(a, search))
    for number in itertools.count():
        if search.proven() or search.expired() or (number == COOLINGS and np.isinf(search.remaining())):
            break
        chosen, warmth = _random_choice(a, search), 1.0
        if number % 2 and search.choice is not None:
            chosen, warmth = a.starts[:-1] + search.choice, REHEAT
        steps, share = SWEEPS * len(free) << number // 2, 1 / max(1, COOLINGS - number)
        _cool(search, a, u, free, chosen, price.copy(), hot * warmth, hot * COLDEST, steps, share * search.remaining())
        search.details["coolings"] = number + 1


def _cool(
    search: Search,
    a: Arrays,
    u: PairedUses,
    free: Integers,
    chosen: Integers,
    price: Floats,
    hot: float,
    cold: float,
    steps: int,
    seconds: float,
) -> None:
    """Cool a chain with ``steps`` moves; faster if ``seconds`` are not enough."""
    state = search.rng.integers(1, 2**63, size=1, dtype=np.uint64)
    ratio, rate = (cold / hot) ** (1.0 / steps), min(0.1, max(0.01, 10.0 * len(free) / steps))
    best, value, start, done = chosen.copy(), NO_BEST, search.elapsed(), 0
    while done < steps and not search.expired():
        record, moves = value, min(CHUNK, steps - done)
        schedule = Schedule(hot * ratio**done, ratio, moves, rate)
        value = cool_paired(a, u, free, chosen, price, state, schedule, best, value)
        done = max(done + moves, int(steps * min(1.0, (search.elapsed() - start) / seconds)))
        if value < record:
            search.offer(best - a.starts[:-1])


def _random_choice(a: Arrays, search: Search) -> Integers:
    return a.starts[:-1] + search.rng.integers(0, np.diff(a.starts))


def _scales(a: Arrays, u: PairedUses, chosen: Integers) -> tuple[float, Floats]:
    """Return the first temperature, and prices at which a usual change of a use costs as much."""
    descend_flat(a, chosen)
    total, field, _ = begin(a, chosen)
    use_field, _ = begin_uses(u, chosen)
    sample = np.unique(np.linspace(0, len(a.cost) - 1, SAMPLE).astype(np.int64))
    others = [(chosen[a.group_of[new]], new) for new in sample if new != chosen[a.group_of[new]]]
    hot = _usual([delta(a, total, field, old, new) for old, new in others])
    uses = [_usual([use_change(u, use_field, old, new, k) for old, new in others]) for k in range(len(u.limit))]
    return hot, hot * u.unit / np.array(uses)


def _usual(changes: list[float]) -> float:
    """Return the median size of the changes that are not zero; 1 without any."""
    sizes = np.abs(changes)
    sizes = sizes[sizes > 1e-13 * (1.0 + sizes.max(initial=0.0))]
    return float(np.median(sizes)) if len(sizes) else 1.0
