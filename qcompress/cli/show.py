"""``show``: print a readable summary of a file or run folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.markdown import Markdown

import formulations.problem
import solvers.compare.suite
import solvers.compare.tables
import solvers.journal
import solvers.solution
import solvers.sweep
from formulations import FileFormatError, Problem
from formulations.file_kinds import kind_of
from formulations.formatting import amount, number
from qcompress.cli.console import out, print_lines, print_table
from qcompress.cli.printing import print_compared, print_solution
from qcompress.cli.sweep import print_sweep
from solvers import Solution
from solvers.compare import Comparison, Suite
from solvers.sweep import Sweep

if TYPE_CHECKING:
    from qcompress import Measurement

SHOWN = ("comparison.json", "suite.json", "report.json")
JOURNAL = "run.json"
FINGERPRINT = 12  # characters that distinguish problems
MODEL_SUFFIX = ".safetensors"
READ = (
    "'show' reads the problem, solution, measurement, comparison, sweep, journal, report and model files that "
    "qcompress writes, and folders of 'compress' and 'compare'"
)
FOR_OTHERS = {".csv": "spreadsheets", ".html": "a browser", ".md": "readers of text", ".png": "viewers of pictures"}


def show(
    file: Annotated[
        Path,
        typer.Argument(
            help="A problem, solution, measurement, comparison, sweep, journal, report or model file, or a folder "
            "of 'compress' or 'compare'."
        ),
    ],
    problem: Annotated[
        Path | None, typer.Option(help="The problem of a solution, to show the names of what was chosen.")
    ] = None,
) -> None:
    """Print a readable summary of a file or of a run's folder.

    Example: `qcompress show runs/small/solution.json --problem runs/small/problem.npz`
    """
    if file.is_dir():
        _show_folder(file)
    elif file.suffix == MODEL_SUFFIX:
        _show_model(file)
    else:
        _show_value(file, problem)


def _show_folder(folder: Path) -> None:
    """Show the result in a folder of `compress` or `compare`, or how far the run is."""
    if (summary := folder / "summary.md").exists():
        out.print(Markdown(summary.read_text(encoding="utf-8")))
    elif result := next((folder / name for name in SHOWN if (folder / name).exists()), None):
        _show_value(result, None)
    elif (folder / JOURNAL).exists():
        _show_steps(folder)
    else:
        names = ", ".join(sorted(item.name for item in folder.iterdir())) or "nothing"
        raise FileFormatError(f"{folder} is not a folder written by 'compress' or 'compare'; it contains {names}")


def _show_steps(folder: Path) -> None:
    from qcompress.run_folder import RunFolder

    rows = [
        (step, f"{entry['wall_s']:.1f} s", "done" if entry["done"] else "not finished")
        for step, entry in RunFolder(folder).steps.items()
    ]
    print_lines("This run was interrupted; the same command resumes it.")
    print_table(("step", ">time", "state"), rows)


def _show_value(file: Path, problem_file: Path | None) -> None:
    from qcompress import measurement, report

    if (readers := FOR_OTHERS.get(file.suffix)) and file.exists():
        raise FileFormatError(f"{file} is for {readers}; {READ}")
    try:
        kind = kind_of(file)
    except FileFormatError as error:
        raise FileFormatError(f"{file} is not a file of qcompress, or is damaged; {READ}") from error
    if kind == formulations.problem.FILE_KIND.name:
        _show_problem(Problem.load(file))
    elif kind == solvers.solution.FILE_KIND.name:
        _show_solution(Solution.load(file), None if problem_file is None else Problem.load(problem_file))
    elif kind == solvers.compare.tables.FILE_KIND.name:
        print_compared(Comparison.load(file))
    elif kind == solvers.compare.suite.SUITE_KIND.name:
        print_compared(Suite.load(file))
    elif kind == solvers.sweep.FILE_KIND.name:
        print_sweep(Sweep.load(file))
    elif kind == solvers.journal.FILE_KIND.name:
        _show_journal(file)
    elif kind == report.FILE_KIND.name:
        out.print(Markdown(report.Report.load(file).to_markdown()))
    elif kind == measurement.FILE_KIND.name:
        _show_measurement(measurement.Measurement.load(file))
    else:
        raise FileFormatError(f"{file} is a file of the kind {kind!r}; {READ}")


def _show_journal(file: Path) -> None:
    """Show which runs of `compare` or `sweep` are in a journal."""
    runs: dict[tuple[str, str], list[Solution]] = {}
    with solvers.journal.FILE_KIND.building(file):
        for key, value in solvers.journal.read_journal(file):
            run = key["problem"][:FINGERPRINT], key.get("label", key["solver"])
            runs.setdefault(run, []).append(Solution.from_json(value, str(file)))
    rows = []
    for (problem, label), solutions in runs.items():
        best = min((run.objective for run in solutions if run.objective is not None), default=None)
        rows.append(
            (problem, label, str(len(solutions)), number(best), f"{sum(run.wall_s for run in solutions):.1f} s")
        )
    print_lines("Finished runs; the same command with this journal makes the others.")
    print_table(("problem", "solver", ">runs", ">best objective", ">time"), rows)


def _show_problem(problem: Problem) -> None:
    print_lines(repr(problem).strip("<>"))
    smallest = problem.minimum_usage()
    starts = problem.group_offsets[:-1]
    uses = []
    for name, use in problem.resources.items():
        limit = amount(problem.budgets[name]) if name in problem.budgets else "–"
        uses.append((name, amount(smallest[name]), limit, amount(float(np.maximum.reduceat(use, starts).sum()))))
    print_table(("resource", ">smallest", ">budget", ">largest"), uses)
    groups = [
        (name, "; ".join(options), f"{number(cost.min(), 3)} … {number(cost.max(), 3)}")
        for name, options, cost in zip(problem.groups, problem.options, np.split(problem.cost, starts[1:]), strict=True)
    ]
    print_table(("group", "options", "cost"), groups)


def _show_solution(solution: Solution, problem: Problem | None) -> None:
    if problem is not None and solution.problem_fingerprint != problem.fingerprint():
        raise FileFormatError("this solution belongs to another problem than the one given with --problem")
    print_solution(solution, {} if problem is None else dict(problem.budgets))
    if problem is None or solution.choice is None:
        return
    chosen = problem.flat(solution.choice)
    rows = [
        (
            name,
            options[local],
            number(problem.cost[flat], 3),
            *(amount(use[flat]) for use in problem.resources.values()),
        )
        for name, options, local, flat in zip(
            problem.groups, problem.options, solution.choice.tolist(), chosen.tolist(), strict=True
        )
    ]
    print_table(("group", "choice", ">cost alone", *(f">{name}" for name in problem.resources)), rows)


def _show_measurement(measurement: "Measurement") -> None:
    from qcompress.report import by_reason

    print_lines(
        f"Measurement by {measurement.method} ({measurement.loss}) over {measurement.num_samples} samples: "
        f"{len(measurement.parts)} parts, {len(measurement.cost)} options, factor rank {measurement.factor.shape[1]}"
    )
    print_lines(", ".join(f"original {name} {amount(value)}" for name, value in measurement.original.items()))
    size_bytes = measurement.resources["bytes"]
    rows, kept = [], {item.name for item in measurement.kept}
    flat = 0
    for part, labels in zip(measurement.parts, measurement.labels, strict=True):
        for label in labels:
            if part.name not in kept:
                rows.append((part.name, label, amount(size_bytes[flat]), number(measurement.cost[flat], 3)))
            flat += 1
    print_table(("part", "option", ">bytes", ">loss increase alone"), rows)
    skipped = {item.name: item.reason for item in measurement.unchanged}
    sizes = {item.name: item.size_bytes for item in measurement.unchanged}
    left = by_reason(skipped, sizes, measurement.original.get("bytes", 0.0))
    print_lines(*(f"left unchanged: {line}" for line in left))


def _show_model(file: Path) -> None:
    from qcompress.compressed.file import stored_parts

    rows = []
    for item in stored_parts(file):
        target = item.part.target
        before, after = target.num_weights * target.dtype.itemsize, item.transform.size_bytes(target)
        rows.append((item.part.name, item.transform.label, f"{before:,}", f"{after:,}"))
    print_lines(f"Compressed model, {file.stat().st_size:,} bytes")
    print_table(("part", "stored as", ">bytes before", ">bytes"), rows)
