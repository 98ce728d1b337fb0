"""Improve samples, and record their quality after each step: as sampled, decoded, repaired, polished.

Every sample is counted, valid or not. Results of repair or polish are never reported as results of the sampler. All
reported choices went through repair, which does not change feasible choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from solvers.base import Search
from solvers.errors import SolverError
from solvers.kernels.local_search import polish, polish_flat
from solvers.kernels.moves import Arrays, Floats, Integers, judge_all
from solvers.kernels.repair import repair, repair_flat

POLISHED = 3
"""Maximum number of repaired samples of a round that are polished, best first."""

POLISH_PASSES = 20


def states_of(sample_set: Any, variables: Sequence[Any]) -> tuple[NDArray[np.int8], Floats]:
    """Return states ``(n, variables)`` of 0 and 1 and energies ``(n,)``, lowest energy first, with repetitions.

    Args:
        sample_set: a ``dimod.SampleSet`` of bits or of spins.
        variables: variables of the columns to return.

    Raises:
        SolverError: ``sample_set`` is not a sample set, or lacks some of the variables.
    """
    if not all(hasattr(sample_set, name) for name in ("record", "variables")):
        raise SolverError(f"a sampler must return a dimod.SampleSet, found {type(sample_set).__name__}")
    if missing := [v for v in variables if v not in sample_set.variables]:
        raise SolverError(f"the sampler's answer lacks {len(missing)} variables, the first of them {missing[0]!r}")
    columns = [sample_set.variables.index(v) for v in variables]
    order = np.argsort(sample_set.record.energy, kind="stable")
    order = np.repeat(order, sample_set.record.num_occurrences[order])
    states = (sample_set.record.sample[np.ix_(order, columns)] > 0).astype(np.int8)
    return states, np.asarray(sample_set.record.energy[order], dtype=np.float64)


@dataclass
class Quality:
    """Best objectives and counts of the samples before and after each step; objectives are scaled, None without any."""

    raw: float | None = None  # valid (one option per group) and within the budgets as sampled
    decoded: float | None = None  # within the budgets after decoding
    repaired: float | None = None
    polished: float | None = None
    samples: int = 0
    valid: int = 0  # one option per group as sampled
    feasible_raw: int = 0
    feasible_decoded: int = 0
    distinct: int = 0  # distinct choices, counted per round
    repaired_count: int = 0  # distinct choices within the budgets after repair; fewer if the time was over
    failed: int = 0  # repair found no feasible choice
    polished_count: int = 0

    def tell(self, search: Search) -> None:
        """Write all values to the search's details."""
        shares = {"valid": self.valid, "feasible_raw": self.feasible_raw, "feasible_decoded": self.feasible_decoded}
        objectives = {"raw": self.raw, "decoded": self.decoded, "repaired": self.repaired, "polished": self.polished}
        search.details |= {f"objective_{name}": search.as_stated(value) for name, value in objectives.items()}
        search.details |= {f"share_{name}": count / max(1, self.samples) for name, count in shares.items()}
        search.details |= {"samples": self.samples, "distinct": self.distinct, "repair_failed": self.failed}
        search.details |= {"num_repaired": self.repaired_count, "num_polished": self.polished_count}


@dataclass
class Improver:
    """Repair and polish decoded samples, report the choices, and record the gain of each step."""

    problem: Problem
    search: Search
    arrays: Arrays
    quality: Quality = field(default_factory=Quality)

    def take(self, choices: Integers, valid: NDArray[np.bool_] | None = None) -> None:
        """Process choices ``(n, G)``, best samples first; ``valid`` marks those from valid samples (None: all)."""
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
        firsts = np.sort(np.unique(chosen, axis=0, return_index=True)[1])  # best first, in case time runs out
        quality.distinct += len(firsts)
        repaired = []
        for candidate in chosen[firsts]:
            if repair_flat(a, candidate, self.search.expired):
                repaired.append(candidate)
            else:
                quality.failed += 1
            if self.search.expired():
                break
        quality.repaired_count += len(repaired)
        if not repaired:
            return
        values = judge_all(a, np.stack(repaired))[0] + self.problem.offset
        quality.repaired = _least(quality.repaired, values)
        order = np.argsort(values, kind="stable")
        self._offer(repaired[order[0]])
        for place in order[:POLISHED]:
            if self.search.expired():
                break
            polish_flat(a, repaired[place], POLISH_PASSES)
            quality.polished_count += 1
            quality.polished = _least(quality.polished, judge_all(a, repaired[place][None])[0] + self.problem.offset)
            self._offer(repaired[place])

    def stand_in(self, choice: Integers) -> None:
        """Repair, polish and report a choice ``(G,)`` that is not from a sampler, and not counted as a sample."""
        feasible = repair(self.problem, choice, self.search.expired)
        if feasible is not None:
            self.search.offer(feasible)
            self.search.offer(polish(self.problem, feasible, self.search.remaining()))

    def _offer(self, chosen: Integers) -> None:
        self.search.offer(chosen - self.problem.group_offsets[:-1])


def _least(known: float | None, values: Floats) -> float | None:
    if not len(values):
        return known
    return float(values.min()) if known is None else min(known, float(values.min()))
