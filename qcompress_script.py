"""Entry point of the ``qcompress`` script: Ctrl-C ends it without a traceback even while it is still importing.

Importing anything of `qcompress` imports PyTorch, which takes seconds, and an interrupt in that time is raised in the
middle of someone else's module. This module is outside the package so that it can prepare for it beforehand.
"""

import os
import signal
from types import FrameType

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended."""


def main() -> int:
    """Import the command line and run it; return the exit status."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # it is another one if the caller ignores Ctrl-C, as `nohup` does
        signal.signal(signal.SIGINT, _end)
    try:
        from qcompress.cli import main as run
    finally:
        signal.signal(signal.SIGINT, before)
    return run()


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  (Python's interface)
    """End the process at once; an exception might be caught, or wrapped in another one, by what is being imported."""
    os._exit(INTERRUPTED)
