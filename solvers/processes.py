"""Run pieces of work in other processes through joblib, and recover when processes die.

The processes run locally by default, or on a cluster under ``joblib.parallel_config(backend="dask")`` or ``"ray"``. If
a process dies (killed, out of memory, crashed), its unfinished pieces are run again. If this happens repeatedly without
any result in between, the pieces that may be the cause are tried one by one, and `LOST` is returned for those whose
process dies.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from typing import Any, Final, TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Lost:
    """Result of a piece whose process died in every attempt."""


LOST: Final = Lost()

MOST_LOSSES = 2
"""Number of consecutive losses without any result after which pieces are tried one by one."""


def in_processes(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], jobs: int
) -> Iterator[tuple[int, Result | Lost]]:
    """Yield the index and result of every piece, in the order of completion.

    Args:
        work: function that can be pickled; its exceptions are raised in the caller.
        pieces: arguments for the calls of ``work``.
        jobs: number of processes at the same time; -1 for one per core.
    """
    import joblib  # local import: it is slow and not needed for a single process

    backend = joblib.parallel.get_active_backend()[0]
    at_once = getattr(backend, "supports_return_generator", False)  # Ray returns all results at the end
    allow_replacing_workers()
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


def allow_replacing_workers() -> None:
    """Do not warn when joblib replaces a worker that was idle for long or whose memory has grown.

    The warning arises in a thread of joblib's. Where filters make it an error, as ``python -W error`` and pytest do, it
    ends that thread, and whoever waits for results waits forever.
    """
    warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given to the executor")


def is_loss(error: Exception) -> bool:
    """Whether the error means that a process died, and not that its work failed."""
    ray_lost = type(error).__module__.startswith("ray.") and "Died" in type(error).__name__ + str(error)
    return isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker" or ray_lost


def _numbered(work: Callable[[Any], Any], number: int, piece: Any) -> tuple[int, Any]:
    return number, work(piece)
