"""Checks against the memory of the machine."""

import ctypes
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from qcompress.errors import OptionsError

SHOWN = 3

HELD = 1 << 28
"""Bytes of decoded options, or of gradients, that may be kept in memory."""


def room_on(device: torch.device) -> int:
    """Return how many bytes of decoded options, or of gradients, may be kept on a device.

    It is `HELD`; on a CUDA device an eighth of the free memory, if that is more.

    >>> room_on(torch.device("cpu"))
    268435456
    """
    return max(HELD, torch.cuda.mem_get_info(device)[0] // 8) if device.type == "cuda" else HELD


def available_bytes() -> int | None:
    """Return the memory that is free or can be freed, as reported by Linux; None on other systems."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    lines = (line.split() for line in file.read_text().splitlines())
    return next((1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:"), None)


def require_memory(wanted: Mapping[str, int]) -> None:
    """Raise an error, before anything runs, if second moments do not fit into memory.

    Args:
        wanted: layer → bytes.

    Raises:
        OptionsError: they do not fit; the message names the largest layers and a remedy.
    """
    total, room = sum(wanted.values()), available_bytes()
    if room is None or total <= room:
        return
    largest = sorted(wanted, key=lambda name: -wanted[name])[:SHOWN]
    named = ", ".join(f"{name!r} ({wanted[name] / 1e9:.2g} GB)" for name in largest)
    raise OptionsError(
        f"compensated and whitened options need second moments of {total / 1e9:.3g} GB here, but {room / 1e9:.3g} GB "
        f"are free; the largest are those of {named}. Give these layers other options, such as "
        f"{{{largest[0]!r}: prune_quantize(), '*': …}}, or leave them out with skip="
    )


def return_free_memory() -> None:
    """Return freed memory to the system, because glibc keeps pieces of up to 32 MB; do nothing on other systems."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


class MemoryTrimmer:
    """Return freed memory to the system after every so many bytes of work.

    Args:
        every: bytes of weights or gradients after which memory is returned.

    >>> trimmer = MemoryTrimmer(every=10)
    >>> [trimmer.after(8) for _ in range(4)]
    [False, True, False, True]
    """

    def __init__(self, every: int = 1 << 26) -> None:
        self._every, self._done = every, 0

    def after(self, done_bytes: int) -> bool:
        """Count work; return memory, and True, if it is time."""
        self._done += done_bytes
        if due := self._done > self._every:
            return_free_memory()
            self._done = 0
        return due
