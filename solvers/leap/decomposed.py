"""Problems larger than a quantum processor: block-coordinate descent, part after part on the processor.

A block of groups that fits is decided anew while all others stay as they are (`formulations.presolve.restrict`), and
its best answer is kept when it is better. Blocks are random and cover every group in each pass; the descent ends with
a pass that improved nothing. What always holds: the choice is within the budgets from the first one on.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from formulations import Problem
from formulations.presolve import restrict
from solvers.base import Search
from solvers.errors import InvalidOptionError
from solvers.leap.qpu import QuantumProcessor
from solvers.moves import Integers
from solvers.run import objective_size

if TYPE_CHECKING:
    from solvers.leap.job import Job


@dataclass(frozen=True)
class Decomposed(QuantumProcessor):
    """Parts of a problem on a quantum processor, one after the other.

    Attributes:
        calls: most parts that are sent; each is charged as one problem of `num_reads` samples.
        variables: most variables of a part; None: what the processor holds fully coupled.
    """

    name: ClassVar[str] = "qpu-decomposed"
    summary: ClassVar[str] = "a quantum processor, or its mock, on parts of a problem that is too large for it"
    has_jobs: ClassVar[bool] = False
    calls: int = 20
    variables: int | None = None

    def run(self, problem: Problem, search: Search) -> None:
        """Descend until a pass improves nothing, the calls are used up, or time is."""
        from solvers.bounds import dual_bound
        from solvers.repair import repair

        with search.phase("build_s"):
            if search.choice is None:
                start = repair(problem, dual_bound(problem, time_limit=1.0).choice)
                if start is None:
                    return
                search.offer(start)
            room = self.device().largest_clique() if self.variables is None else self.variables
        first, used, improved, since = search.objective, 0, 0, 0
        blocks: list[Integers] = []
        while used < self.calls and not search.expired():
            if not blocks:
                if since:
                    break
                blocks, since = self._blocks(problem, room, search.rng), 1
            better = self._improve(problem, search, blocks.pop())
            used, improved, since = used + 1, improved + better, 0 if better else since
        assert first is not None  # noqa: S101
        search.details |= {"calls": used, "improved": improved, "room": room, "start": search.unscaled(first)}

    def submit(self, problem: Problem, *, time_limit: float | None = None) -> "Job":  # noqa: ARG002
        """Refused: it is many problems, each decided by the one before."""
        raise InvalidOptionError(
            f"{self.name!r} sends many problems, each after the one before: it cannot be left alone"
        )

    def _improve(self, problem: Problem, search: Search, block: Integers) -> bool:
        """Decide the groups of ``block`` anew; whether that was better."""
        assert search.choice is not None  # noqa: S101
        keep = np.isin(problem.group_of, block)
        keep[problem.flat(search.choice)] = True
        part = restrict(problem, keep)
        scale = 1.0 / objective_size(part.problem)
        seed = int(search.rng.integers(2**31))
        part_search = Search(part.problem, solver=self.name, scale=scale, seed=seed)
        processor = QuantumProcessor(**self._shared())
        with search.phase("parts_s"):
            processor.run(part.problem.scaled(scale), part_search)
        for name, seconds in part_search.timing.items():
            search.timing[name] = search.timing.get(name, 0.0) + seconds
        return part_search.choice is not None and search.offer(part.lift(part_search.choice))

    def _shared(self) -> dict[str, Any]:
        return {"config": self.config} | {name: getattr(self, name) for name in QuantumProcessor.option_defaults()}

    def _blocks(self, problem: Problem, room: int, rng: np.random.Generator) -> list[Integers]:
        """All groups with a choice, in random blocks of at most ``room`` variables each (but one group at least)."""
        sizes = np.diff(problem.group_offsets) - (1 if self.encoding == "domain-wall" else 0)
        blocks: list[list[int]] = [[]]
        filled = 0
        for group in rng.permutation(np.flatnonzero(np.diff(problem.group_offsets) > 1)):
            if blocks[-1] and filled + sizes[group] > room:
                blocks.append([])
                filled = 0
            blocks[-1].append(int(group))
            filled += int(sizes[group])
        return [np.array(block, dtype=np.int64) for block in blocks if block]
