"""What is seen while something runs: one line on stderr that is kept up to date, and nothing when nobody looks."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from qcompress.cli.console import err, number, percent
from solvers import Progress as SolverProgress

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from qcompress import MeasureProgress


class Watch:
    """The line, with a function for each ``on_progress`` of the library."""

    def __init__(self, display: Progress, task: TaskID) -> None:
        self._display, self._task = display, task

    def measured(self, progress: "MeasureProgress") -> None:
        """Show batches and samples."""
        total = "" if progress.total_batches is None else f" of {progress.total_batches}"
        state = f"{progress.batches}{total} batches, {progress.num_samples} samples"
        self._display.update(self._task, description="measuring", state=state)

    def solved(self, progress: SolverProgress) -> None:
        """Show incumbent, bound and gap."""
        incumbent, bound = number(progress.objective), number(progress.bound)
        state = f"incumbent {incumbent}  bound {bound}  gap {percent(progress.gap)}"
        self._display.update(self._task, description=f"solving with {progress.solver}", state=state)


@contextlib.contextmanager
def watching(what: str) -> Iterator[Watch]:
    """Keep the line as long as the block runs."""
    columns = (
        SpinnerColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as display:
        yield Watch(display, display.add_task(what, total=None, state=""))
