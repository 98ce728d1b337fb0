"""Compile numerical kernels with numba, cache them on disk, and announce compilation to the user.

The machine code is stored next to the module (or in numba's user cache if that folder is read-only), so each kernel is
compiled once per machine. The announcement appears at most once per process, and only if something is compiled.
"""

import logging
from collections.abc import Callable, Set
from functools import cache
from typing import Any

from numba import njit
from numba.core import event

_logger = logging.getLogger(__name__)


def compiled(function: Callable[..., Any], *, fastmath: bool | Set[str] = False) -> Any:
    """Compile a kernel by ``numba.njit``: cached on disk, without the interpreter lock, and announced.

    Args:
        function: the kernel.
        fastmath: floating-point optimisations that LLVM may use, same as in numba.
    """
    _announce_compilation()
    return njit(cache=True, nogil=True, fastmath=fastmath)(function)


class _Announcement(event.Listener):  # type: ignore[misc]
    """Log a warning at the first compilation, which Python prints to stderr unless logging is configured."""

    def on_start(self, event: Any) -> None:  # noqa: ARG002  (numba's interface)
        _tell()

    def on_end(self, event: Any) -> None:
        """Do nothing, because the next line of output shows that compilation has ended."""


@cache
def _announce_compilation() -> None:
    event.register("numba:compile", _Announcement())


@cache
def _tell() -> None:
    _logger.warning("qcompress: compiling numerical kernels; this happens once on a machine and takes up to a minute")
