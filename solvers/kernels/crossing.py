"""Compiled crossover of two choices: the groups in which they differ fall into parts that have no pair terms in common.

The change in the objective from one parent's options to the other's adds up over such parts, so the child takes the
better parent's options in each part and is at least as good as both parents. This is partition crossover (Tinós,
Whitley and Chicano, doi:10.1145/2725494.2725497), or the cluster move of spin glasses (Houdayer,
doi:10.1007/PL00011151). Many parts exist if pair terms are sparse and the parents are similar. A factor links all
groups, so the child is then one of the parents.

If no pair term and no cost distinguishes a choice from its mirror image (both options of every group swapped, as in
max-cut), the nearer one of the father and its mirror image is the parent.
"""

import numpy as np

from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Arrays, Integers, begin, judge_all


@compiled
def _root(parent: Integers, group: int) -> int:
    while parent[group] != group:
        parent[group] = parent[parent[group]]
        group = parent[group]
    return group


@compiled
def parts_of(a: Arrays, mother: Integers, father: Integers) -> Integers:
    """Return one group of each part as the part's number ``(G,)``, and -1 for groups in which the parents agree."""
    parent = np.where(mother != father, np.arange(len(mother)), -1)
    first = -1
    for group in range(len(mother)):
        if parent[group] < 0:
            continue
        if a.factor.shape[1]:
            first = group if first < 0 else first
            parent[group] = first
            continue
        for option in (mother[group], father[group]):
            for entry in range(a.indptr[option], a.indptr[option + 1]):
                partner = a.indices[entry]
                other = a.group_of[partner]
                if parent[other] >= 0 and (partner == mother[other] or partner == father[other]):
                    parent[_root(parent, other)] = _root(parent, group)
    for group in range(len(mother)):
        if parent[group] >= 0:
            parent[group] = _root(parent, group)
    return parent


@compiled
def cross_parts(a: Arrays, mother: Integers, father: Integers, ties: Integers) -> tuple[Integers, int]:
    """Cross two choices part by part, in a problem without budgets; return the child and the number of parts.

    Args:
        a: the problem.
        mother: ``(G,)`` flat options.
        father: ``(G,)`` flat options.
        ties: ``(G,)`` 0 for the mother's options or 1 for the father's if both are equally good, by part.
    """
    parts = parts_of(a, mother, father)
    total1, field1, _ = begin(a, mother)
    total2, field2, _ = begin(a, father)
    change, size = np.zeros(len(mother)), np.zeros(len(mother))
    for group in range(len(mother)):
        if parts[group] < 0:
            continue
        old, new = mother[group], father[group]
        gain = a.cost[new] - a.cost[old] + 0.5 * (field1[new] + field2[new] - field1[old] - field2[old])
        for k in range(len(total1)):
            others = total1[k] - a.factor[old, k] + total2[k] - a.factor[new, k]  # of both choices
            gain += 0.5 * (a.factor[new, k] - a.factor[old, k]) * others
        change[parts[group]] += gain
        size[parts[group]] += abs(gain)
    child, count = mother.copy(), 0
    for group in range(len(mother)):
        part = parts[group]
        if part < 0:
            continue
        count += part == group
        rounding = 1e-12 * size[part]
        if change[part] < -rounding or (change[part] <= rounding and ties[part]):
            child[group] = father[group]
    return child, count


def mirrored(a: Arrays, chosen: Integers) -> Integers:
    """Return the mirror image of a choice of groups with two options (others stay): the other option everywhere."""
    pairs = np.diff(a.starts) == 2
    return np.where(pairs, 2 * a.starts[:-1] + 1 - chosen, chosen)


def is_symmetric(a: Arrays, rng: np.random.Generator) -> bool:
    """Whether some random choices are as good as their mirror images, in a problem without budgets."""
    if len(a.limit) or (np.diff(a.starts) > 2).any():
        return False
    chosen = a.starts[:-1] + rng.integers(0, np.diff(a.starts), size=(4, len(a.starts) - 1))
    values, _ = judge_all(a, chosen)
    images, _ = judge_all(a, np.array([mirrored(a, choice) for choice in chosen]))
    return bool(np.all(np.abs(values - images) <= 1e-9 * np.maximum(1.0, np.abs(values))))
