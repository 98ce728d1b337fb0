"""Processor time in place of the clock's, for machines that others use as well; a model's time beside another's."""

import contextlib
import ctypes
import functools
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

PAIRS = 11

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@contextlib.contextmanager
def processor_time(cores: int) -> Iterator[None]:
    """Let `time.perf_counter`, and with it every time limit, count processor time per core inside the block."""
    wall = time.perf_counter
    time.perf_counter = lambda: time.process_time() / cores
    try:
        yield
    finally:
        time.perf_counter = wall


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed, as allocators of servers do; elsewhere nothing changes.

    It returns large blocks to the system otherwise, at a threshold that moves with what was freed before. A pass then
    spends up to half its time on new pages or none, whatever its arithmetic, and ratios of times change with the
    process's history.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@torch.no_grad()
def time_ratios(model: nn.Module, dense: nn.Module, batch: Tensor) -> dict[str, float]:
    """Processor and wall time of a batch on one thread relative to the dense network's: medians of alternating runs."""
    keep_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def seconds(network: nn.Module) -> np.ndarray:
        begun = time.process_time(), time.perf_counter()
        network(batch)
        return np.array([time.process_time(), time.perf_counter()]) - begun

    pairs = [seconds(model) / seconds(dense) for _ in range(PAIRS + 2)]
    torch.set_num_threads(threads)
    processor, wall = np.median(pairs[2:], axis=0).tolist()
    return {"time": processor, "wall": wall}
