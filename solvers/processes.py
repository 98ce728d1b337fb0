"""Pieces of work in other processes through joblib: every result comes back, though processes are lost.

Processes of this machine by default, a cluster under ``joblib.parallel_config(backend="dask")`` or ``"ray"``. Where a
process dies (killed, out of memory, crashed), what it had not given back is done again; when that happens again and
again without any result between, the pieces that may be to blame are tried one by one, and those whose process dies
come back as `LOST`.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from typing import Any, Final, TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Lost:
    """What comes back for a piece whose process died whenever it was tried."""


LOST: Final = Lost()

MOST_LOSSES = 2
"""Losses one after the other without any result between, before pieces are tried one by one."""


def in_processes(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], jobs: int
) -> Iterator[tuple[int, Result | Lost]]:
    """Number and result of every piece, in the order they come.

    Args:
        work: a function that can be pickled; it raises nothing that the caller does not want raised here.
        pieces: what it is called with.
        jobs: processes at the same time; -1 for one a core.
    """
    import joblib  # here: it takes a while, and one process needs none

    backend = joblib.parallel.get_active_backend()[0]
    at_once = getattr(backend, "supports_return_generator", False)  # Ray gives all back at the end
    waiting, losses = dict(enumerate(pieces)), 0
    while waiting:
        suspects = list(waiting)[: 2 * joblib.effective_n_jobs(jobs)] if losses > MOST_LOSSES else []
        for numbers in [[number] for number in suspects] or [list(waiting)]:
            parallel = joblib.Parallel(
                n_jobs=jobs, return_as="generator_unordered" if at_once else "list", batch_size=1
            )
            calls = [joblib.delayed(_numbered)(work, number, waiting[number]) for number in numbers]
            try:
                for number, result in parallel(calls):
                    yield number, result
                    del waiting[number]
                    losses = 0
            except Exception as error:
                if not is_loss(error):
                    raise
                losses += 1
                if suspects:
                    yield numbers[0], LOST
                    del waiting[numbers[0]]
        losses = 0 if suspects else losses


def is_loss(error: Exception) -> bool:
    """Whether a process is gone, rather than something wrong with its work."""
    ray_lost = type(error).__module__.startswith("ray.") and "Died" in type(error).__name__ + str(error)
    return isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker" or ray_lost


def _numbered(work: Callable[[Any], Any], number: int, piece: Any) -> tuple[int, Any]:
    return number, work(piece)
