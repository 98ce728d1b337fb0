"""Progress display: a live line on stderr; without a terminal, an occasional line of text."""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from formulations.formatting import number, percent
from qcompress.cli.console import err
from solvers import Progress as SolverProgress

if TYPE_CHECKING:  # the measuring side is imported only by commands that measure
    from qcompress import EncodeProgress, FinetuneProgress, MeasureProgress, RefineStep, TimingProgress


LINE_EVERY_S = 10.0  # without a terminal


class Watch:
    """The progress line, with a function for each ``on_progress`` of the library."""

    def __init__(self, display: Progress, task: TaskID) -> None:
        self._display, self._task = display, task
        self._last_line = time.monotonic()
        self.finetuning: FinetuneProgress | None = None

    def callbacks(self) -> dict[str, Any]:
        """Return the callbacks of `qcompress.compress`."""
        return {
            "on_encode": self.encoded,
            "on_measure": self.measured,
            "on_timing": self.timed,
            "on_progress": self.solved,
            "on_round": self.refined,
            "on_finetune": self.finetuned,
        }

    def encoded(self, progress: "EncodeProgress") -> None:
        """Show encoded parts and the forecast."""
        left = "" if progress.remaining_s is None else f"about {progress.remaining_s:.0f} s left, "
        state = f"{progress.parts} of {progress.total_parts} layers, {left}{progress.size_bytes / 1e6:,.1f} MB held"
        self._show("encoding options", state, progress.parts, progress.total_parts)

    def measured(self, progress: "MeasureProgress") -> None:
        """Show measured batches and samples."""
        total = "" if progress.total_batches is None else f" of {progress.total_batches}"
        state = f"{progress.batches}{total} {progress.unit}, {progress.num_samples} samples"
        self._show("measuring", state, progress.batches, progress.total_batches)

    def timed(self, progress: "TimingProgress") -> None:
        """Show timed layers."""
        state = f"{progress.layers} of {progress.total_layers} layers"
        self._show("timing every option", state, progress.layers, progress.total_layers)

    def solved(self, progress: SolverProgress) -> None:
        """Show incumbent, bound and gap."""
        incumbent, bound = number(progress.objective), number(progress.bound)
        state = f"incumbent {incumbent}  bound {bound}  gap {percent(progress.gap)}"
        self._show(f"solving with {progress.solver}", state)

    def refined(self, step: "RefineStep") -> None:
        """Show the result of a round."""
        self._show("refining", f"{step.changes} parts changed, true loss {number(step.loss)}")

    def finetuned(self, progress: "FinetuneProgress") -> None:
        """Show steps and losses; `finetuning` holds the last report."""
        self.finetuning = progress
        state = (
            f"step {progress.step:,} of {progress.steps:,}  loss {number(progress.loss)}  best {number(progress.best)}"
        )
        self._show("fine-tuning", state, progress.step, progress.steps)

    def _show(self, what: str, state: str, done: int = 0, total: int | None = None) -> None:
        self._display.update(self._task, description=what, completed=done, total=total, state=state)
        if not err.is_terminal and time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            err.print(f"{what}: {state}")


@contextlib.contextmanager
def watching(what: str) -> Iterator[Watch]:
    """Show the progress line while the block runs."""
    columns = (
        SpinnerColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as display:
        yield Watch(display, display.add_task(what, total=None, state=""))
