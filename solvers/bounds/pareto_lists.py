"""Solve linear problems exactly, by Pareto lists over the options that a bound and an incumbent leave open.

A dual bound L with prices λ gives every option a reduced cost ≥ 0, and for every feasible choice

    objective = L + Σ reduced + Σ_k λ_k·(limit_k - usage_k).

With an incumbent U, an option whose reduced cost reaches U - L is in no better choice and is dropped. Of 10,000 groups
often a few dozen remain, the core (Pisinger, doi:10.1016/0377-2217(94)00132-E). Over the core, starting with the groups
that are cheapest to change, a list of states (usage, reduced cost) is extended group by group. A state means "the
groups so far as chosen, the others at their cheapest option", so every list also contains complete choices. A state is
dropped if it can no longer meet a budget, if its bound reaches U - L, or if another state uses no more and costs no
more. Uses are never rounded or binned, so budgets hold to the byte.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from solvers.bounds.duality import DualBound
from solvers.kernels.compiled import compiled
from solvers.kernels.moves import Floats, Integers, to_arrays
from solvers.search import Search

TIE, ROUNDING = 1e-3, 1e-15
"""To replace the incumbent, a choice must be better by the first number times the search's tolerance, and by the second
relative to the largest costs."""

GRACE_S = 0.3
"""Time in seconds by which a step may probably exceed the time limit."""

COMPARED = 64
"""Number of earlier states with which a state is compared under several budgets (a lower number keeps more states)."""


_Step = tuple[NDArray[np.int32], NDArray[np.int32]]
"""For each state of a list: its parent state, and the option of the group that it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """The undecided part of the problem: N groups of open options, sorted so that the cheapest to change come first.

    The open options of core group i are ``starts[i]:starts[i + 1]`` of ``options``, ``reduced`` and ``deviation``.
    The last four fields bound the changes in the groups from i on; with several budgets ``down`` and ``up`` are 0.
    """

    base: Integers  # (G,) flat: the cheapest option of every group at the prices
    starts: Integers  # (N+1,)
    options: Integers  # (M,) flat
    reduced: Floats  # (M,)
    deviation: Floats  # (M, K) use minus that of the group's base option
    alternative: Floats  # (N,) the smallest reduced cost of the open options other than the base
    low: Floats  # (N+1, K) the largest possible decrease of each usage (not positive)
    high: Floats  # (N+1, K) the largest possible increase of each usage
    down: Floats  # (N+1,) the smallest reduced cost per unit of decrease in usage
    up: Floats  # (N+1,) the smallest reduced cost per unit of increase in usage

    @classmethod
    def of(cls, problem: Problem, bound: DualBound, gap: float) -> "Core":
        """Build the core from the groups with more than one option whose reduced cost is below ``gap``."""
        a = to_arrays(problem)
        base = a.starts[:-1] + bound.choice
        is_base = np.zeros(len(a.cost), dtype=bool)
        is_base[base] = True
        is_open = (bound.reduced < gap) | is_base
        several = np.bincount(a.group_of[is_open], minlength=len(base)) > 1
        options = np.flatnonzero(is_open & several[a.group_of])
        starts, deviation = _starts(a.group_of[options]), a.use[options] - a.use[base[a.group_of[options]]]
        alternative = np.where(is_base, np.inf, bound.reduced)[options]
        effort = alternative / np.maximum(np.abs(deviation) @ (1.0 / a.unit), 1e-300)

        sizes = np.diff(starts)
        order = np.argsort(np.minimum.reduceat(effort, starts[:-1]), kind="stable") if len(sizes) else sizes
        new_starts = np.concatenate([[0], np.cumsum(sizes[order])])
        moved = np.repeat(starts[order] - new_starts[:-1], sizes[order]) + np.arange(len(options))
        options, deviation, alternative = options[moved], deviation[moved], alternative[moved]
        single = deviation.shape[1] == 1
        lowered, raised = (deviation[:, 0] < 0, deviation[:, 0] > 0) if single else (None, None)
        return cls(
            base=base,
            starts=new_starts,
            options=options,
            reduced=bound.reduced[options],
            deviation=deviation,
            alternative=_each(np.minimum, alternative, new_starts),
            low=_behind(np.add, _each(np.minimum, deviation, new_starts), 0.0),
            high=_behind(np.add, _each(np.maximum, deviation, new_starts), 0.0),
            down=_cheapest_unit(alternative, deviation, lowered, new_starts),
            up=_cheapest_unit(alternative, deviation, raised, new_starts),
        )


def _starts(groups: Integers) -> Integers:
    """Return the starts of runs of equal numbers, and the end."""
    return np.append(np.flatnonzero(np.diff(groups, prepend=-1)), len(groups))


def _each(function: np.ufunc, values: Floats, starts: Integers) -> Floats:
    """Reduce ``values`` by ``function`` over the options of every group."""
    none = np.zeros((0, *values.shape[1:]))
    return function.reduceat(values, starts[:-1], axis=0) if len(starts) > 1 else none


def _behind(function: np.ufunc, values: Floats, end: float) -> Floats:
    """Reduce ``values`` by ``function`` over the groups from i on, for i = 0..N."""
    padded = np.concatenate([values, np.full((1, *values.shape[1:]), end)])
    result: Floats = function.accumulate(padded[::-1], axis=0)[::-1]
    return result


def _cheapest_unit(reduced: Floats, deviation: Floats, able: NDArray[np.bool_] | None, starts: Integers) -> Floats:
    if able is None:
        return np.zeros(len(starts))
    ratio = np.full(len(reduced), np.inf)
    ratio[able] = reduced[able] / np.abs(deviation[able, 0])
    return _behind(np.minimum, _each(np.minimum, ratio, starts), np.inf)


def prove(problem: Problem, search: Search, bound: DualBound, *, max_states: int) -> bool:
    """Solve a problem without pair terms from its dual bound and the incumbent, and report better choices.

    Args:
        problem: a problem without pair terms.
        search: the search, which provides the incumbent, gets every better choice, and is closed when all choices were
            considered.
        bound: dual bound of this problem.
        max_states: maximum length of a list.

    Returns:
        Whether all choices were considered; False when time or ``max_states`` ended it.
    """
    a = to_arrays(problem)
    incumbent = search.objective
    rounding = ROUNDING * float(np.linalg.norm(np.maximum.reduceat(np.abs(problem.cost), a.starts[:-1])))
    cap = np.inf if incumbent is None else incumbent - bound.value - max(rounding, TIE * search.tolerance())
    core = Core.of(problem, bound, cap)
    groups = len(core.starts) - 1
    search.details["core_groups"] = groups
    price = np.array([bound.prices[name] for name in problem.budgets])
    usage, reduced = a.use[core.base].sum(axis=0)[None], np.zeros(1)
    history: list[_Step | None] = []
    pace = 0.0
    for layer in range(groups + 1):
        slack = a.limit - usage
        complete = np.where((slack >= 0).all(axis=1), reduced + slack @ price, np.inf)
        best = int(np.argmin(complete))
        if complete[best] < cap:
            search.offer(_walk_back(core, history, best, a.group_of) - a.starts[:-1])
            if search.objective is not None:
                cap = min(cap, search.objective - bound.value - max(rounding, TIE * search.tolerance()))
        if layer == groups:
            break
        if search.expired() or len(reduced) > max_states:
            return False
        if core.alternative[layer] >= cap:  # with the present incumbent, this group cannot change any more
            history.append(None)
            continue
        span, rest = slice(core.starts[layer], core.starts[layer + 1]), layer + 1
        begun, candidates = search.elapsed(), len(reduced) * (core.starts[rest] - core.starts[layer])
        if pace * candidates > search.remaining() + GRACE_S:
            search.cut_short()
            return False
        usage, reduced, parent, option = _extend(
            usage,
            reduced,
            core.deviation[span],
            core.reduced[span],
            a.limit,
            price,
            core.low[rest],
            core.high[rest],
            core.down[rest],
            core.up[rest],
            cap,
        )
        if len(reduced) == 0:
            break
        order = np.argsort(usage[:, 0], kind="stable")
        kept = order[_undominated(usage[order], reduced[order], price)]
        pace = (search.elapsed() - begun) / candidates
        usage, reduced = usage[kept], reduced[kept]
        history.append((parent[kept], option[kept]))
    search.close()
    return True


def _walk_back(core: Core, history: list[_Step | None], state: int, group_of: Integers) -> Integers:
    """Return the flat options ``(G,)`` of a state of the last list."""
    chosen = core.base.copy()
    for layer in range(len(history) - 1, -1, -1):
        step = history[layer]
        if step is None:
            continue
        parent, option = step
        v = core.options[core.starts[layer] + option[state]]
        chosen[group_of[v]] = v
        state = int(parent[state])
    return chosen


@compiled  # eleven arguments: a tuple of them is unpacked at every call, which takes 40 % longer for short lists
def _extend(
    usage: Floats,
    reduced: Floats,
    deviation: Floats,
    option_reduced: Floats,
    limit: Floats,
    price: Floats,
    low: Floats,
    high: Floats,
    down: float,
    up: float,
    cap: float,
) -> tuple[Floats, Floats, NDArray[np.int32], NDArray[np.int32]]:
    """Decide one more group: return usage, reduced cost, parent and option of all states with a bound below ``cap``."""
    states, options, budgets = len(reduced), len(option_reduced), len(limit)
    new_usage, new_reduced = np.empty((states * options, budgets)), np.empty(states * options)
    parent, option = np.empty(states * options, np.int32), np.empty(states * options, np.int32)
    count = 0
    for v in range(options):
        for state in range(states):
            cost = reduced[state] + option_reduced[v]
            bound = cost
            within = True
            for k in range(budgets):
                used = usage[state, k] + deviation[v, k]
                new_usage[count, k] = used
                slack = limit[k] - used
                within &= slack >= low[k]
                if budgets > 1 or slack > high[k]:
                    bound += price[k] * max(0.0, slack - high[k])
            if not within:
                continue
            if budgets == 1:
                if slack < 0.0:
                    bound = max(bound, cost - slack * down)
                elif slack > 0.0:
                    bound = max(bound, cost + slack * min(price[0], up))
            if bound < cap:
                new_reduced[count], parent[count], option[count] = cost, state, v
                count += 1
    return new_usage[:count], new_reduced[:count], parent[:count], option[:count]


@compiled
def _undominated(usage: Floats, reduced: Floats, price: Floats) -> Integers:
    """Return the states, sorted by their first usage, that no other state dominates."""
    states, budgets = usage.shape
    cost = reduced.copy()  # true cost: a lower usage leaves more slack, which `reduced` contains only at the end
    for state in range(states):
        for k in range(budgets):
            cost[state] -= price[k] * (usage[state, k] - usage[0, k])
    kept = np.empty(states, np.int64)
    count = 0
    for state in range(states):
        useless = False
        for i in range(count - 1, max(-1, count - 1 - COMPARED), -1):
            earlier = kept[i]
            useless = cost[earlier] <= cost[state]
            for k in range(1, budgets):
                useless &= usage[earlier, k] <= usage[state, k]
            if useless or budgets == 1:
                break
        if not useless:
            if budgets == 1 and count and usage[kept[count - 1], 0] == usage[state, 0]:
                count -= 1
            kept[count] = state
            count += 1
    return kept[:count]
