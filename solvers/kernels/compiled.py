"""Compile numerical kernels with numba, cache them on disk, and announce compilation to the user.

The machine code is stored next to the module (or in numba's user cache if that folder is read-only), so each kernel is
compiled once per machine; a cache of an earlier version of the package is replaced. The announcement appears at most
once per process, and only if something is compiled.
"""

import hashlib
import logging
from collections.abc import Callable, Set
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher

_logger = logging.getLogger(__name__)


def compiled(function: Callable[..., Any], *, fastmath: bool | Set[str] = False) -> Any:
    """Compile a kernel by ``numba.njit``: cached on disk, without the interpreter lock, and announced.

    Args:
        function: the kernel.
        fastmath: floating-point optimisations that LLVM may use, same as in numba.
    """
    _announce_compilation()
    kernel = njit(nogil=True, fastmath=fastmath)(function)
    kernel._cache = _Cache(function)  # noqa: SLF001  (what cache=True sets, see `_Cache`)
    return kernel


class _Cache(FunctionCache):  # type: ignore[misc]
    """A cache on disk that notices two changes which numba's own cache misses.

    The code of a kernel includes that of the kernels it calls, so it is compiled again when their modules change.
    Moreover, numba unpickles a cache, with the classes of its arguments, before it compares the age of the source. A
    named tuple that an earlier version of the package had under another name would be an error in every later run.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the machine code for a signature; None if there is none or it cannot be read any more."""
        try:
            return super().load_overload(sig, target_context)
        except (AttributeError, ImportError):
            self.flush()
            return None

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), *map(_digest, sorted(_files(self._py_func))))


@cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _files(kernel: Any) -> set[str]:
    """Return the source files of a kernel and of all kernels that it calls, directly or through others."""
    names = (kernel.__globals__.get(name) for name in kernel.__code__.co_names)
    called = {value.py_func for value in names if isinstance(value, Dispatcher)} - {kernel}
    return {kernel.__code__.co_filename}.union(*map(_files, called))


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
    _logger.warning("qcompress: compiling numerical kernels on their first use; this takes up to a minute")
