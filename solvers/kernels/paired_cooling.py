"""A compiled annealing run with the true uses of budgets that have pair terms; the prices adapt as in `cooling`."""

import numpy as np
from numpy.typing import NDArray

from solvers.kernels.compiled import compiled
from solvers.kernels.cooling import PAIRED, Schedule, below, draw, other
from solvers.kernels.moves import Arrays, Floats, Integers, begin, cross, delta, objective, switch
from solvers.kernels.paired_uses import PairedUses, begin_uses, cross_use, excess, switch_uses, use_change


@compiled
def cool_paired(
    a: Arrays,
    u: PairedUses,
    free: Integers,
    chosen: Integers,
    price: Floats,
    state: NDArray[np.uint64],
    schedule: Schedule,
    best: Integers,
    best_value: float,
) -> float:
    """Anneal from ``chosen`` for ``schedule.steps`` moves; return the objective of the best choice so far.

    The arguments are those of `solvers.kernels.cooling.cool`, with the problem without budgets in ``a`` and the uses
    and limits of its budgets in ``u``.
    """
    temperature, ratio, steps, rate = schedule
    total, field, none = begin(a, chosen)
    use_field, usage = begin_uses(u, chosen)
    value = objective(a, chosen, field)
    num_budgets, num_free = len(u.limit), len(free)
    for step in range(steps):
        if value < best_value - 1e-12 * abs(value) and excess(u, usage) <= 0.0 and _fits_anew(a, u, chosen):
            best_value = value
            best[:] = chosen
        temperature *= ratio
        if step % num_free == 0:
            for k in range(num_budgets):
                price[k] *= 1.0 + rate if usage[k] > u.limit[k] else 1.0 / (1.0 + rate)
        first, second, third = draw(state), draw(state), draw(state)
        place1 = below(first, num_free)
        old1 = chosen[free[place1]]
        new1 = other(a, free[place1], old1, first)
        old2 = new2 = -1  # no second switch
        change = delta(a, total, field, old1, new1)
        if num_free > 1 and (third & np.uint64(255)) < np.uint64(PAIRED):
            place2 = below(second, num_free - 1)
            group2 = free[place2 + 1 if place2 >= place1 else place2]
            old2 = chosen[group2]
            new2 = other(a, group2, old2, second)
            change += delta(a, total, field, old2, new2) + cross(a, old1, new1, old2, new2)
        rise = change
        for k in range(num_budgets):
            more = use_change(u, use_field, old1, new1, k)
            if new2 >= 0:
                more += use_change(u, use_field, old2, new2, k) + cross_use(u, old1, new1, old2, new2, k)
            over = usage[k] - u.limit[k]
            rise += price[k] * (max(0.0, over + more) - max(0.0, over)) / u.unit[k]
        uniform = (np.float64(third >> np.uint64(11)) + 0.5) * 2.0**-53
        if rise > 0.0 and rise > -temperature * np.log(uniform):
            continue
        switch_uses(u, use_field, usage, old1, new1)
        switch(a, chosen, total, field, none, new1)
        if new2 >= 0:
            switch_uses(u, use_field, usage, old2, new2)
            switch(a, chosen, total, field, none, new2)
        value += change
    return best_value


@compiled
def _fits_anew(a: Arrays, u: PairedUses, chosen: Integers) -> bool:
    """Whether every budget holds, with uses summed afresh (a running sum accumulates rounding errors)."""
    for k in range(len(u.limit)):
        usage = 0.0
        for v in chosen:
            usage += u.use[v, k]
            for entry in range(u.indptr[v], u.indptr[v + 1]):
                partner = u.indices[entry]
                if partner > v and chosen[a.group_of[partner]] == partner:
                    usage += u.data[entry, k]
        if usage > u.limit[k]:
            return False
    return True
