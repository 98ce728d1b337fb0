"""``compare``: run several solvers with several seeds on one problem or many."""

from pathlib import Path
from typing import Annotated

import typer

from formulations.formatting import number
from qcompress.cli import arguments
from qcompress.cli.console import complain, print_json, say
from qcompress.cli.printing import print_compared
from solvers import Solution
from solvers.compare.runs import Comparison, Suite


def compare(
    problem_files: Annotated[
        list[Path], typer.Argument(metavar="PROBLEM...", help="Problem files, as written by 'qcompress formulate'.")
    ],
    solver: Annotated[
        list[str] | None,
        typer.Option(
            "--solver", "-s", help="A solver to run. May be given several times. Default: all available ones."
        ),
    ] = None,
    time_limit: arguments.TimeLimit = 10.0,
    seeds: Annotated[int, typer.Option(help="Number of runs of each solver, with seeds 0, 1, ….", min=1)] = 3,
    jobs: Annotated[
        int, typer.Option(help="Number of simultaneous runs. They share the cores; use 1 to compare times.")
    ] = 1,
    journal: arguments.JournalFile = None,
    output: Annotated[Path, arguments.output_option("Folder for values, table and plots.")] = Path("comparison"),
    as_json: arguments.AsJson = False,
) -> int:
    """Run several solvers with several seeds on one problem or many; write a table and plots of quality over time.

    Example: `qcompress compare problem.npz --solver anneal --solver milp --seeds 5 --time-limit 10`
    """
    from formulations import Problem
    from formulations.files import replacing
    from solvers import available
    from solvers.compare.runs import compare as run

    problems = {file.stem: Problem.load(file) for file in problem_files}
    if len(problems) < len(problem_files):
        raise typer.BadParameter("the problem files must have different names, because the table lists them by name.")
    names = solver or [info.name for info in available() if info.available and not info.needs_network]

    def told(label: str, solution: Solution) -> None:
        say(f"{label} seed {solution.seed}: {number(solution.objective)} ({solution.status}, {solution.wall_s:.1f} s)")

    asked = problems if len(problems) > 1 else next(iter(problems.values()))
    compared: Comparison | Suite = run(
        asked, names, time_limit=time_limit, seeds=range(seeds), jobs=jobs, journal=journal, on_run=told
    )
    output.mkdir(parents=True, exist_ok=True)
    value_file = "comparison.json" if isinstance(compared, Comparison) else "suite.json"
    compared.save(output / value_file)
    with replacing(output / "comparison.md") as file:
        file.write(compared.to_markdown().encode())
    comparisons = [compared] if isinstance(compared, Comparison) else list(compared.comparisons.values())
    unsolved = all(comparison.best is None for comparison in comparisons)
    plots = [] if unsolved else _drawn(compared, output)
    say(f"wrote to {output}: {', '.join([value_file, 'comparison.md', *plots])}")
    if as_json:
        print_json(compared.to_json())
    else:
        print_compared(compared)
    if unsolved:
        return complain("no solver found a choice within the budgets; raise a budget or allow more time")
    return 0


def _drawn(compared: Comparison | Suite, output: Path) -> list[str]:
    """Draw the plots and return their names; without matplotlib, print why there are none."""
    from qcompress.errors import MissingError
    from qcompress.plots import plot_anytime, plot_profile

    drawn = []
    try:
        if isinstance(compared, Comparison):
            plot_anytime(compared, output / "anytime.png")
            drawn.append("anytime.png")
        plot_profile(compared, output / "profile.png")
        drawn.append("profile.png")
    except MissingError as error:
        say(f"no plot: {error}")
    return drawn
