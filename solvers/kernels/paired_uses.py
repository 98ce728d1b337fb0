"""Repair and descent for problems whose budgets have pair terms, with the true uses.

In addition to the state of `solvers.kernels.moves`, a kernel keeps ``use_field`` ``(V, K)``, the use by each option's
pair terms with the chosen options. If `repair_paired` returns True, the choice is within the budgets. A descent that
starts within the budgets also ends within them.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse

from formulations import Problem
from formulations.problem import limit_of
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Arrays, Floats, Integers, begin, delta, switch, to_arrays

PAIRS = 400_000
"""Number of pairs of switches evaluated in a pass of the descent; if there are more, partners are sampled.

A pass takes some groups as partners, and of very large groups some options.
"""


class PairedUses(NamedTuple):
    """Uses of the K budgets by single options and by pairs, the latter as a symmetric matrix shared by all budgets."""

    use: Floats  # (V, K)
    limit: Floats  # (K,) budgets minus fixed uses, with the tolerance of Problem.evaluate
    unit: Floats  # (K,) unit of the excess over each budget
    indptr: Integers
    indices: Integers
    data: Floats  # (nnz, K)


def arrays_of(problem: Problem) -> tuple[Arrays, PairedUses]:
    """Return the problem without budgets, for the kernels of the objective, and its uses."""
    budgets = np.array(list(problem.budgets.values()))
    fixed = np.array([problem.fixed.get(name, 0.0) for name in problem.budgets])
    use = np.stack([problem.resources[name] for name in problem.budgets], axis=1)
    size = problem.num_options
    pattern = scipy.sparse.csr_array((size, size))
    for name in problem.paired_budgets:
        terms = problem.resource_pairs[name]
        pattern = pattern + scipy.sparse.csr_array(
            (np.ones(terms.nnz), terms.indices, terms.indptr), shape=(size, size)
        )
    pattern = scipy.sparse.csr_array(pattern + pattern.T)
    pattern.sort_indices()
    rows = np.repeat(np.arange(size), np.diff(pattern.indptr))
    data = np.zeros((pattern.nnz, len(budgets)))
    for k, name in enumerate(problem.budgets):
        if name in problem.resource_pairs:
            half = problem.resource_pairs[name]
            data[:, k] = np.asarray((half + half.T)[rows, pattern.indices]).ravel()
    limit = limit_of(budgets) - fixed
    uses = PairedUses(
        use=np.ascontiguousarray(use),
        limit=limit,
        unit=np.where(np.abs(limit) > 0, np.abs(limit), 1.0),
        indptr=pattern.indptr.astype(np.int64),
        indices=pattern.indices.astype(np.int64),
        data=data,
    )
    return to_arrays(problem.derived(budgets={}, resource_pairs={})), uses


@compiled
def begin_uses(u: PairedUses, chosen: Integers) -> tuple[Floats, Floats]:
    """Compute ``(use_field, usage)`` of the chosen flat options."""
    num_budgets = len(u.limit)
    field, usage = np.zeros((len(u.use), num_budgets)), np.zeros(num_budgets)
    for v in chosen:
        for entry in range(u.indptr[v], u.indptr[v + 1]):
            for k in range(num_budgets):
                field[u.indices[entry], k] += u.data[entry, k]
    for v in chosen:
        for k in range(num_budgets):
            usage[k] += u.use[v, k] + 0.5 * field[v, k]
    return field, usage


@compiled
def use_change(u: PairedUses, field: Floats, old: int, new: int, k: int) -> float:
    """Compute the change in a use from switching from ``old`` to ``new`` in the same group."""
    return float(u.use[new, k] + field[new, k] - u.use[old, k] - field[old, k])


@compiled
def switch_uses(u: PairedUses, field: Floats, usage: Floats, old: int, new: int) -> None:
    """Update the uses for a switch."""
    for k in range(len(usage)):
        usage[k] += use_change(u, field, old, new, k)
    for entry in range(u.indptr[old], u.indptr[old + 1]):
        for k in range(len(usage)):
            field[u.indices[entry], k] -= u.data[entry, k]
    for entry in range(u.indptr[new], u.indptr[new + 1]):
        for k in range(len(usage)):
            field[u.indices[entry], k] += u.data[entry, k]


@compiled
def excess(u: PairedUses, usage: Floats) -> float:
    """Sum the excess over the budgets, each in its unit."""
    total = 0.0
    for k in range(len(usage)):
        total += max(0.0, usage[k] - u.limit[k]) / u.unit[k]
    return total


@compiled
def repair_paired(a: Arrays, u: PairedUses, chosen: Integers) -> bool:
    """Switch options in the order of cost per unit of excess, in place; return whether every budget holds.

    Each round evaluates the best switch of every group and makes the cheapest tenth of them, as long as they help.
    """
    total, field, _ = begin(a, chosen)
    use_field, usage = begin_uses(u, chosen)
    groups = len(chosen)
    price, best = np.empty(groups), np.empty(groups, np.int64)
    for _ in range(len(a.cost)):
        over = excess(u, usage)
        if over <= 0.0:
            break
        for group in range(groups):
            price[group], best[group] = _cheapest_switch(a, u, chosen, total, field, use_field, usage, group)
        improved = False
        for group in np.argsort(price)[: 1 + groups // 10]:
            if over <= 0.0 or price[group] == np.inf:
                break
            old, new = chosen[group], best[group]
            if _excess_after(u, use_field, usage, old, new) < over - 1e-12:
                switch_uses(u, use_field, usage, old, new)
                switch(a, chosen, total, field, np.zeros(0), new)
                over, improved = excess(u, usage), True
        if not improved:
            break
    _, usage = begin_uses(u, chosen)
    return bool(excess(u, usage) <= 0.0)


@compiled
def _excess_after(u: PairedUses, use_field: Floats, usage: Floats, old: int, new: int) -> float:
    after = 0.0
    for k in range(len(usage)):
        after += max(0.0, usage[k] + use_change(u, use_field, old, new, k) - u.limit[k]) / u.unit[k]
    return after


@compiled
def _cheapest_switch(
    a: Arrays,
    u: PairedUses,
    chosen: Integers,
    total: Floats,
    field: Floats,
    use_field: Floats,
    usage: Floats,
    group: int,
) -> tuple[float, int]:
    """Return the cost per unit of excess of the group's best switch, and that switch; infinite if none helps."""
    over, old, price, best = excess(u, usage), chosen[group], np.inf, -1
    for new in range(a.starts[group], a.starts[group + 1]):
        if new != old:
            after = _excess_after(u, use_field, usage, old, new)
            if after < over - 1e-12:
                ratio = delta(a, total, field, old, new) / (over - after)
                if ratio < price:
                    price, best = ratio, new
    return price, best


@compiled
def _entry(indptr: Integers, indices: Integers, option: int, partner: int) -> int:
    """Return the position of the term of two options, or -1."""
    low, high = indptr[option], indptr[option + 1]
    end = high
    while low < high:
        middle = (low + high) // 2
        if indices[middle] < partner:
            low = middle + 1
        else:
            high = middle
    return low if low < end and indices[low] == partner else -1


@compiled
def cross_use(u: PairedUses, old1: int, new1: int, old2: int, new2: int, k: int) -> float:
    """Compute the use by two switches together, minus the uses by each alone."""
    change = 0.0
    for option, partner, sign in ((new1, new2, 1.0), (new1, old2, -1.0), (old1, new2, -1.0), (old1, old2, 1.0)):
        entry = _entry(u.indptr, u.indices, option, partner)
        if entry >= 0:
            change += sign * u.data[entry, k]
    return change


@compiled
def _cross_cost(a: Arrays, old1: int, new1: int, old2: int, new2: int) -> float:
    change = 0.0
    for k in range(a.factor.shape[1]):
        change += (a.factor[new1, k] - a.factor[old1, k]) * (a.factor[new2, k] - a.factor[old2, k])
    for option, partner, sign in ((new1, new2, 1.0), (new1, old2, -1.0), (old1, new2, -1.0), (old1, old2, 1.0)):
        entry = _entry(a.indptr, a.indices, option, partner)
        if entry >= 0:
            change += sign * a.data[entry]
    return change


@compiled
def sampled_partners(num_options: int, num_groups: int, number: int) -> tuple[int, int, int, int]:
    """Return the first partner and the step to the next for a pass: groups, and the options of a group.

    >>> sampled_partners(1000, 500, 7)  # a million pairs
    (1, 2, 0, 1)
    >>> sampled_partners(15_000, 12, 50)  # one group each, and every 46th of its options
    (2, 12, 4, 46)
    """
    step = max(1, num_options * num_options // PAIRS)
    groups, options = min(step, num_groups), max(1, step // num_groups)
    return number % groups, groups, number // groups % options, options


@compiled
def descend_paired(a: Arrays, u: PairedUses, chosen: Integers, first: int, passes: int, paired: bool) -> bool:
    """Improve a choice in place by single switches and, if ``paired``, by two switches at once, within the budgets.

    The descent ends when no switch improves the objective or after ``passes`` passes. Return whether the last pass
    still improved it. ``first`` is the number of the first pass, which selects the partners to try.
    """
    num_budgets = len(u.limit)
    for number in range(first, first + passes):
        total, field, _ = begin(a, chosen)
        use_field, usage = begin_uses(u, chosen)
        improved = False
        first_group, groups, first_option, options = sampled_partners(len(a.cost), len(chosen), number)
        for group in range(len(chosen)):
            old, best, least = chosen[group], -1, -1e-13 * (1.0 + abs(a.cost[chosen[group]]))
            for new in range(a.starts[group], a.starts[group + 1]):
                fits = new != old
                for k in range(num_budgets):
                    fits &= usage[k] + use_change(u, use_field, old, new, k) <= u.limit[k]
                if fits:
                    change = delta(a, total, field, old, new)
                    if change < least:
                        least, best = change, new
            if best >= 0:
                switch_uses(u, use_field, usage, old, best)
                switch(a, chosen, total, field, np.zeros(0), best)
                improved = True
        for group in range(len(chosen) if paired else 0):
            old1, best1, best2 = chosen[group], -1, -1
            least = -1e-13 * (1.0 + abs(a.cost[old1]))
            for partner in range(first_group, len(chosen), groups):
                if partner == group:
                    continue
                old2 = chosen[partner]
                for new1 in range(a.starts[group], a.starts[group + 1]):
                    if new1 == old1:
                        continue
                    alone = delta(a, total, field, old1, new1)
                    for new2 in range(a.starts[partner] + first_option, a.starts[partner + 1], options):
                        if new2 == old2:
                            continue
                        change = alone + delta(a, total, field, old2, new2)
                        change += _cross_cost(a, old1, new1, old2, new2)
                        if change >= least:
                            continue
                        fits = True
                        for k in range(num_budgets):
                            after = usage[k] + use_change(u, use_field, old1, new1, k)
                            after += use_change(u, use_field, old2, new2, k)
                            fits &= after + cross_use(u, old1, new1, old2, new2, k) <= u.limit[k]
                        if fits:
                            least, best1, best2 = change, new1, new2
            if best1 >= 0:
                for new in (best1, best2):
                    switch_uses(u, use_field, usage, chosen[a.group_of[new]], new)
                    switch(a, chosen, total, field, np.zeros(0), new)
                improved = True
        if not improved:
            return False
    return True
