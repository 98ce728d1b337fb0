"""Work on rows that are independent of each other, distributed over as many threads as torch uses."""

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

LEAST = 1 << 15
"""Weights that are worth a thread of their own."""


def over_rows(work: Callable[[int, int], object], rows: int, per_row: int) -> None:
    """Call ``work(start, stop)`` for ranges of rows that cover all of them, several at once.

    Args:
        work: releases Python's global lock, gives the same result for a row whatever its range, and does not call this
            function itself.
        rows: number of rows.
        per_row: weights in a row.

    >>> done = np.zeros(4)
    >>> over_rows(lambda start, stop: done[start:stop].fill(1.0), rows=4, per_row=1 << 16)
    >>> done.sum()
    np.float64(4.0)
    """
    threads = torch.get_num_threads()
    workers = max(1, min(threads, rows, rows * per_row // LEAST))
    if workers == 1:
        if rows:
            work(0, rows)
        return
    bounds = np.linspace(0, rows, min(rows, 2 * workers) + 1).astype(int).tolist()  # ranges may take unequal time
    list(_pool(threads, os.getpid()).map(lambda ends: work(*ends), itertools.pairwise(bounds)))


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:  # noqa: ARG001  (a forked process has none of them)
    return ThreadPoolExecutor(threads)
