"""A compiled annealing run in sweeps over all groups, for problems without budgets.

Without budgets, moves need neither prices nor partners, and most of them are rejected at low temperatures. A sweep
visits the groups in their order, so a rejected move costs a few nanoseconds: one look at ``cost + field`` of two
options, and no random number if its rise is far above the temperature. Random numbers are hashes of the number of the
move (SplitMix64, doi:10.1145/2714064.2660195), so that they do not depend on which moves are accepted, and rounding
cannot shift the random stream.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from solvers.kernels.compiled import compiled
from solvers.kernels.cooling import Schedule
from solvers.kernels.moves import Arrays, Floats, Integers, begin, objective

HOPELESS = 25.0
"""Rise in units of the temperature above which a move is rejected without a random number (probability 1e-11)."""

_STRIDE, _OTHER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)


@compiled
def _hash(number: np.uint64) -> np.uint64:
    """Mix 64 bits."""
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


@compiled
def _other(a: Arrays, group: int, old: int, number: np.uint64) -> Any:
    """Choose an option of ``group`` other than ``old``."""
    start, count = a.starts[group], a.starts[group + 1] - a.starts[group]
    if count == 2:
        return 2 * start + 1 - old
    bits = _hash(number ^ _OTHER) >> np.uint64(32)
    new = start + np.int64((bits * np.uint64(count - 1)) >> np.uint64(32))
    return new + 1 if new >= old else new


@compiled
def _make(a: Arrays, chosen: Integers, total: Floats, local: Floats, old: int, new: int) -> None:
    """Switch from ``old`` to ``new`` in place."""
    chosen[a.group_of[new]] = new
    for k in range(len(total)):
        total[k] += a.factor[new, k] - a.factor[old, k]
    for entry in range(a.indptr[old], a.indptr[old + 1]):
        local[a.indices[entry]] -= a.data[entry]
    for entry in range(a.indptr[new], a.indptr[new + 1]):
        local[a.indices[entry]] += a.data[entry]


@compiled
def cool_in_sweeps(
    a: Arrays,
    free: Integers,
    chosen: Integers,
    state: NDArray[np.uint64],
    schedule: Schedule,
    best: Integers,
    best_value: float,
) -> float:
    """Anneal from ``chosen`` for ``schedule.steps`` moves in whole sweeps; return the objective of the best choice.

    The best choice is looked for at the end of every sweep.

    Args:
        a: the problem, without budgets.
        free: groups with more than one option; at least one group.
        chosen: ``(G,)`` flat options, modified in place.
        state: ``(1,)`` state of the random numbers, modified in place.
        schedule: number of moves and temperatures; the last sweep is made in full.
        best: ``(G,)`` the best choice so far, modified in place.
        best_value: objective of ``best`` without offset, or infinity.
    """
    total, field, _ = begin(a, chosen)
    value = objective(a, chosen, field)
    local = a.cost + field
    number, temperature, num_free = state[0], schedule.temperature, len(free)
    for _ in range((schedule.steps + num_free - 1) // num_free):
        hopeless = HOPELESS * temperature
        for group in free:
            number += _STRIDE
            old = chosen[group]
            new = _other(a, group, old, number)
            change = local[new] - local[old]
            for k in range(len(total)):
                change += (a.factor[new, k] - a.factor[old, k]) * (total[k] - a.factor[old, k])
            if change > hopeless:
                continue
            if change > 0.0:
                uniform = (np.float64(_hash(number) >> np.uint64(11)) + 0.5) * 2.0**-53
                if change > -temperature * np.log(uniform):
                    continue
            _make(a, chosen, total, local, old, new)
            value += change
        temperature *= schedule.ratio**num_free
        if value < best_value - 1e-12 * abs(value):
            best_value = value
            best[:] = chosen
    state[0] = number
    return best_value
