"""How numerical kernels are compiled: by numba, kept on disk, and announced where a user has to wait for it.

What always holds: the machine code is kept beside the module (or, where that folder is read-only, in numba's cache
folder of the user), so that a machine compiles a kernel once; the announcement comes only when something really is
compiled, and once a process.
"""

import logging
from collections.abc import Callable, Set
from functools import cache
from typing import Any

from numba import njit
from numba.core import event

_logger = logging.getLogger(__name__)


def compiled(function: Callable[..., Any], *, fastmath: bool | Set[str] = False) -> Any:
    """``numba.njit`` as every kernel here wants it: cached on disk, free of the interpreter lock, announced.

    Args:
        function: the kernel.
        fastmath: which liberties LLVM may take with floating-point numbers, as in numba.
    """
    _announce_compilation()
    return njit(cache=True, nogil=True, fastmath=fastmath)(function)


class _Announcement(event.Listener):  # type: ignore[misc]
    """A warning in the log, which Python prints to stderr where no program configures logging, at the first start."""

    def on_start(self, event: Any) -> None:  # noqa: ARG002  (numba's interface)
        _tell()

    def on_end(self, event: Any) -> None:
        """Nothing: the next line of output says that it went on."""


@cache
def _announce_compilation() -> None:
    event.register("numba:compile", _Announcement())


@cache
def _tell() -> None:
    _logger.warning("qcompress: compiling numerical kernels; this happens once on a machine and takes up to a minute")
