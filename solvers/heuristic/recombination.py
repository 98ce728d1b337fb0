"""Chains of an annealing run, and how two of them make a new one.

With budgets, a child takes each group's option from either parent. Without budgets, pair terms alone decide which
groups matter to each other, so parents are also crossed part by part (`solvers.kernels.crossing`), and every other
generation is made of parents that are heated again: afterwards each part of the choice stays changed only if that
improves it. A large sparse problem is thus improved in many places at once.
"""

import numpy as np

from solvers.kernels.cooling import NO_BEST, Schedule, cool
from solvers.kernels.crossing import cross_parts, is_symmetric, mirrored
from solvers.kernels.moves import Arrays, Floats, Integers, judge_all
from solvers.kernels.sweeping import cool_in_sweeps

REHEAT = 1 / 16
"""First temperature of a child or a given start, relative to that of a random start."""

UNLIMITED_REHEAT = 1 / 4
"""The same in a problem without budgets; parents that are heated again begin between this and 1."""


class AnnealingChain:
    """One chain, with its choice, prices, random numbers and best choice so far.

    Args:
        chosen: ``(G,)`` flat options to start from.
        price: ``(K,)`` prices per unit of excess.
        rng: source of the seed of the chain's random numbers.
        parent: the parent that is heated again, if the chain is one.
    """

    def __init__(
        self, chosen: Integers, price: Floats, rng: np.random.Generator, parent: Integers | None = None
    ) -> None:
        self.chosen, self.price, self.best, self.value = chosen.copy(), price.copy(), chosen.copy(), NO_BEST
        self.state = rng.integers(1, 2**63, size=1, dtype=np.uint64)
        self.parent = parent

    def advance(self, a: Arrays, free: Integers, schedule: Schedule) -> None:
        """Anneal by the moves of the schedule."""
        if len(a.limit):
            self.value = cool(a, free, self.chosen, self.price, self.state, schedule, self.best, self.value)
        else:
            self.value = cool_in_sweeps(a, free, self.chosen, self.state, schedule, self.best, self.value)


def distinct(chains: list[AnnealingChain]) -> list[AnnealingChain]:
    """Return chains with distinct choices, best first (in a stable order)."""
    first = {chain.best.tobytes(): chain for chain in sorted(chains, key=lambda chain: -chain.value)}
    return sorted(first.values(), key=lambda chain: chain.value)


class Breeding:
    """Make generations of chains from the best ones.

    Args:
        a: the problem.
        rng: source of random numbers.
    """

    def __init__(self, a: Arrays, rng: np.random.Generator) -> None:
        self._a, self._rng, self._symmetric = a, rng, is_symmetric(a, rng)
        self._limited, self._generation = bool(len(a.limit)), 0

    def children(self, elite: list[AnnealingChain], count: int) -> tuple[list[AnnealingChain], float]:
        """Return the next generation, and its first temperature relative to that of a random start."""
        self._generation += 1
        if self._limited:
            return [self._mixed(elite) for _ in range(count)], REHEAT
        if self._generation % 2:
            return [self._heated(elite) for _ in range(count)], UNLIMITED_REHEAT ** float(self._rng.random())
        return [self._crossed(elite) for _ in range(count)], UNLIMITED_REHEAT

    def settle(self, chains: list[AnnealingChain]) -> None:
        """Undo, part by part, what did not improve the parents that were heated again."""
        for chain in chains:
            if chain.parent is not None:
                child, _ = self._by_parts(chain.parent, chain.chosen)
                value = float(judge_all(self._a, child[None])[0][0])
                if value < chain.value:
                    chain.best, chain.value = child, value

    def _mixed(self, elite: list[AnnealingChain]) -> AnnealingChain:
        mother, father = self._rng.choice(len(elite), size=2, replace=False)
        mixed = np.where(self._rng.random(len(elite[0].best)) < 0.5, elite[mother].best, elite[father].best)
        return AnnealingChain(mixed, elite[mother].price, self._rng)

    def _heated(self, elite: list[AnnealingChain]) -> AnnealingChain:
        parent = elite[self._rng.integers(len(elite))]
        return AnnealingChain(parent.best, parent.price, self._rng, parent.best)

    def _crossed(self, elite: list[AnnealingChain]) -> AnnealingChain:
        """Cross two parents part by part; group by group if they do not differ in several parts."""
        first, second = self._rng.choice(len(elite), size=2, replace=False)
        mother, father = elite[first].best, elite[second].best
        child, parts = self._by_parts(mother, father)
        if parts < 2:
            child = np.where(self._rng.random(len(mother)) < 0.5, mother, self._nearer(mother, father))
        return AnnealingChain(child, elite[first].price, self._rng)

    def _by_parts(self, mother: Integers, father: Integers) -> tuple[Integers, int]:
        coins = self._rng.integers(0, 2, size=len(mother))
        child, parts = cross_parts(self._a, mother, self._nearer(mother, father), coins)
        return child, parts

    def _nearer(self, mother: Integers, father: Integers) -> Integers:
        """Return the father or its mirror image, whichever differs from the mother in fewer groups."""
        far = self._symmetric and 2 * int(np.sum(mother != father)) > len(mother)
        return mirrored(self._a, father) if far else father
