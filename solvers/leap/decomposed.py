"""Solve problems larger than a quantum processor by block-coordinate descent, part after part on the processor.

A block of groups that fits on the processor is optimised while all other groups are fixed
(`formulations.reductions.restriction.restrict`), and its best answer is kept if it is better. Blocks are random and
cover every group in each pass; the descent ends after a pass without improvement. Every choice is within the budgets,
from the first one on. An interrupted run resumes when it is called again, with the part that was in progress
(`solvers.leap.descent_state`).
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from formulations import Problem
from formulations.reductions.base import Reduction
from formulations.reductions.restriction import restrict
from formulations.reductions.scaling import normal_form
from solvers.base import Search, SubSearch
from solvers.errors import InvalidOptionError, UnsupportedProblemError
from solvers.leap.descent_state import DescentState, descent_path
from solvers.leap.errors import LeapError, LeapProblemError
from solvers.leap.qpu import QuantumProcessor

if TYPE_CHECKING:
    from solvers.leap.connection import Connection
    from solvers.leap.device import Device
    from solvers.leap.estimate import Estimate
    from solvers.leap.job import Job

TOLD = (
    "variables",
    "qubits",
    "longest_chain",
    "chain_strength",
    "chain_breaks",
    "share_valid",
    "share_feasible_decoded",
    "problem_id",
)
"""Entries of the report on each part, besides its groups and whether it improved the choice."""


@dataclass(frozen=True)
class Decomposed(QuantumProcessor):
    """Solve parts of a problem on a quantum processor, one after the other.

    Attributes:
        calls: maximum number of parts to send; each is charged as one run of `num_reads` samples.
        variables: maximum number of variables of a part; None for the largest fully coupled model that fits, or that
            `embedding` holds, which must be an embedding of a complete graph.

    >>> import tempfile
    >>> from formulations.generators.random_instances import layered_problem
    >>> from solvers import solve
    >>> folder = tempfile.mkdtemp()
    >>> solution = solve(layered_problem(6), "qpu-decomposed", simulated=True, seed=0, jobs=folder, variables=10)
    >>> solution.feasible, max(part["variables"] for part in solution.details["parts"])
    (True, 10)
    """

    name: ClassVar[str] = "qpu-decomposed"
    summary: ClassVar[str] = "a quantum processor, or its mock, on parts of a problem that is too large for it"
    has_jobs: ClassVar[bool] = False
    minima: ClassVar[Mapping[str, float]] = {**QuantumProcessor.minima, "calls": 1, "variables": 1}
    calls: int = 20
    variables: int | None = None

    def run(self, problem: Problem, search: Search) -> None:
        """Descend until a pass improves nothing, or the calls or the time are used up."""
        from solvers.leap.connection import connect
        from solvers.leap.device import NoRoomError, NoTimeToEmbedError

        if self.decided(problem, search):
            return
        with self._state(problem, search) as state, contextlib.ExitStack() as stack:
            if state is None:
                return
            connection = None if self.simulated else stack.enter_context(connect(self.config))
            while len(state.parts) < self.calls and not search.expired():
                if not state.blocks:
                    if state.quiet:
                        break
                    state = state.next(blocks=self._blocks(problem, state), passes=state.passes + 1, quiet=True)
                try:
                    state = self._step(problem, search, state, connection)
                except NoTimeToEmbedError:
                    search.cut_short()
                    break
                except NoRoomError:  # only more variables than the largest clique: each group has room alone
                    block, half = state.blocks[-1], len(state.blocks[-1]) // 2
                    halves = (block[:half], block[half:]) if half else ()
                    state = state.next(blocks=(*state.blocks[:-1], *halves))
            search.details |= {"calls": len(state.parts), "improved": sum(part["better"] for part in state.parts)}
            search.details |= {"room": state.room, "start": state.start, "parts": [dict(part) for part in state.parts]}
            state.path.unlink(missing_ok=True)

    def estimate(self, problem: Problem, *, time_limit: float | None = None) -> "Estimate":  # noqa: ARG002
        """Estimate an upper limit, with every call on the whole processor, since the parts are not known in advance.

        Raises:
            UnsupportedProblemError: a group alone has no room on the processor.
            InvalidOptionError: `embedding` is not an embedding of a complete graph on it.
        """
        from solvers.leap.connection import connect
        from solvers.leap.device import Device
        from solvers.leap.embedded import EmbeddedForm, access_time

        if self.simulated:
            remote = self._simulator
        else:
            with connect(self.config) as connection:
                remote = connection.solver(EmbeddedForm.problem_type, self.remote)
        scaled = normal_form(problem).problem
        search = Search(scaled, solver=self.name)
        if self._first(scaled, search):
            self._room(scaled, search, Device(remote.name, remote.properties))
        submissions = self.submissions(self.option_values, None)
        return access_time(len(remote.properties["qubits"]), remote, submissions, None, calls=self.calls)

    def offline(self, problem: Problem, *, time_limit: float | None = None) -> "Estimate":  # noqa: ARG002
        """Estimate what is known without a processor: how much there is to divide into parts."""
        from solvers.leap.embedded import EmbeddedForm
        from solvers.leap.estimate import without_service

        sizes = {"groups": problem.num_groups, "options": problem.num_options, "calls": self.calls}
        return without_service(EmbeddedForm.problem_type, sizes, remote=self.remote)

    def submit(self, problem: Problem, *, time_limit: float | None = None) -> "Job":  # noqa: ARG002
        """Refuse, because the descent sends many problems, each of which depends on the previous one."""
        raise InvalidOptionError(
            f"{self.name!r} sends many problems, each of which depends on the previous one: leave out wait=False"
        )

    @contextlib.contextmanager
    def _state(self, problem: Problem, search: Search) -> Iterator[DescentState | None]:
        """Yield the initial state, from an interrupted run or from a first choice, and lock its file."""
        import fasteners

        options = {name: value for name, value in self.option_values.items() if name != "jobs"}
        initial = None if search.initial is None else search.initial.tolist()
        path = descent_path(self.jobs, [search.original.fingerprint(), options, search.seed, initial])
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = fasteners.InterProcessLock(str(path.with_suffix(".lock")))
        if not lock.acquire(blocking=False):
            lock.lockfile.close()  # fasteners does not close it
            raise LeapError(f"{path} is in use by another process; wait for it, or use another folder or seed")
        try:
            state = DescentState.load(path)
            if state is not None:
                search.offer(state.choice)
                search.details["resumed_at"] = len(state.parts)
            elif self._first(problem, search) and (room := self._room(problem, search, self.device())) is not None:
                start = search.as_stated(search.objective)
                assert start is not None  # noqa: S101
                assert search.choice is not None  # noqa: S101
                state = DescentState(
                    path=path,
                    seed=int(search.rng.integers(2**31)),
                    room=room,
                    start=start,
                    choice=tuple(search.choice.tolist()),
                )
            yield state
        finally:
            lock.release()

    def _first(self, problem: Problem, search: Search) -> bool:
        """Find a first feasible choice, from the dual; return whether there is one."""
        from solvers.bounds.duality import dual_bound
        from solvers.kernels.repair import repair
        from solvers.leap.forms import PRICES_S

        with search.phase("build_s"):
            if search.choice is None:
                start = repair(problem, dual_bound(problem, time_limit=min(PRICES_S, search.remaining())).choice)
                if start is not None:
                    search.offer(start)
        return search.choice is not None

    def _room(self, problem: Problem, search: Search, device: "Device") -> int | None:
        """Return the maximum number of variables of a part; None if the time was too short to find it.

        Raises:
            UnsupportedProblemError: a group alone has no room on the processor.
            InvalidOptionError: `embedding` is not an embedding of a complete graph on it.
        """
        from solvers.leap.device import NoRoomError, NoTimeToEmbedError
        from solvers.leap.embedded import EmbeddedForm

        assert search.choice is not None  # noqa: S101
        own = self.option_values["embedding"]
        with search.phase("embed_s"):
            most = device.largest_clique() if own is None else len(device.placed(own))
        sizes, groups = np.unique(self._bits(problem), return_index=True)  # groups of one size have the same couplings
        for group in groups[sizes > most][::-1].tolist():
            if search.expired():
                return None
            part = normal_form(_part(problem, search.choice, (group,)).problem).problem
            try:
                with search.phase("build_s"):
                    form = EmbeddedForm.priced(part, self.option_values, search.remaining())
                    form.embed(device, self.option_values, search.remaining() if self.simulated else math.inf)
                form.tell_times(search.timing)
            except NoTimeToEmbedError:
                search.cut_short()
                return None
            except (NoRoomError, InvalidOptionError) as error:
                raise UnsupportedProblemError(
                    f"group {problem.groups[group]!r} alone, with {len(problem.options[group])} options, has no room "
                    f"on {device.name!r}, which holds {most} fully coupled variables; nothing was sent: give it fewer "
                    "options, or use another encoding or a larger processor"
                ) from error
        room = most if self.variables is None else self.variables
        return room if own is None else min(room, most)

    def _step(
        self, problem: Problem, search: Search, state: DescentState, connection: "Connection | None"
    ) -> DescentState:
        """Optimise the groups of the next block."""
        block = state.blocks[-1]
        part = _part(problem, state.choice, block)
        seed = int(np.random.default_rng([state.seed, state.passes, len(state.blocks)]).integers(2**31))
        left = search.remaining() if connection is None and search.limit is not None else None  # not for the service
        # only its final choice is offered, as it may be sent again
        alone = Search(part.problem, solver=self.name, seed=seed, time_limit=left)
        inner = SubSearch(normal_form(part.problem), alone)
        self._decide(inner.problem, inner, state, connection)
        for name, seconds in inner.timing.items():
            search.timing[name] = search.timing.get(name, 0.0) + seconds
        better = alone.choice is not None and search.offer(part.lift(alone.choice))
        assert search.choice is not None  # noqa: S101
        record = {"groups": len(block), "better": better}
        return state.next(
            choice=tuple(search.choice.tolist()),
            blocks=state.blocks[:-1],
            quiet=state.quiet and not better,
            parts=(*state.parts, record | {name: inner.details[name] for name in TOLD if name in inner.details}),
            job=None,
        )

    def _decide(self, part: Problem, search: Search, state: DescentState, connection: "Connection | None") -> None:
        """Run a part on the mock or at the service; a part in progress is fetched, not sent again."""
        from solvers.leap.job import Job

        shared = {name: getattr(self, name) for name in QuantumProcessor.option_defaults()}
        processor = QuantumProcessor(config=self.config, **shared)
        if connection is None:
            processor.run(part, search)
            return
        job = None if state.job is None else Job.load(state.path.with_name(state.job))
        try:
            processor.ask(part, search, connection, job, lambda begun: state.next(job=begun.path.name))
        except LeapProblemError:  # the job has ended, so the next call sends the part again
            state.next(job=None)
            raise

    def _bits(self, problem: Problem) -> NDArray[np.int64]:
        """Return the number of bits of each group, or an upper bound, ``(G,)``."""
        sizes: NDArray[np.int64] = np.diff(problem.group_offsets)
        return sizes if self.encoding == "one-hot" else sizes - 1

    def _blocks(self, problem: Problem, state: DescentState) -> tuple[tuple[int, ...], ...]:
        """Divide all groups with a choice into random blocks of at most ``room`` variables, or of one group."""
        sizes = self._bits(problem)
        blocks: list[tuple[int, ...]] = []
        filled = state.room
        rng = np.random.default_rng([state.seed, state.passes])
        for group in rng.permutation(np.flatnonzero(np.diff(problem.group_offsets) > 1)).tolist():
            filled += int(sizes[group])
            if filled > state.room:
                blocks.append(())
                filled = int(sizes[group])
            blocks[-1] += (group,)
        return tuple(blocks)


def _part(problem: Problem, choice: ArrayLike, block: Sequence[int]) -> Reduction:
    """Return the problem of the groups of a block, all others being fixed at a choice ``(G,)``."""
    keep = np.isin(problem.group_of, block)
    keep[problem.flat(choice)] = True
    return restrict(problem, keep)
