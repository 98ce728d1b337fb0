"""``compare``: run several solvers with several seeds on one problem or many."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from formulations.formatting import number, one_line
from qcompress.cli import arguments
from qcompress.cli.console import complain, print_json, print_text, say
from qcompress.cli.flag_groups import with_flag_groups
from qcompress.cli.printing import print_compared
from solvers import Solution, SolverLike
from solvers.compare import Comparison, Suite
from solvers.compare.rows import ERROR, status_of


@dataclass(frozen=True, kw_only=True)
class TargetFlags:
    """Objectives to compare the runs with."""

    best_known: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]VALUE", help="Best objective known so far; NAME is the problem file's name without suffix."
        ),
    ] = None
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]VALUE", help="Target objective. Default: within --within of the best known one."),
    ] = None
    within: Annotated[str, typer.Option(help="Distance from the best known objective that counts as reached.")] = "1%"

    def arguments(self, problems: Mapping[str, object]) -> dict[str, Any]:
        """Return ``best_known``, ``target`` and ``within`` of `solvers.compare.compare` for these problems."""
        return {
            "best_known": _objectives(self.best_known, "--best-known", problems),
            "target": _objectives(self.target, "--target", problems),
            "within": _share(self.within),
        }


@with_flag_groups
def compare(
    problem_files: Annotated[
        list[Path], typer.Argument(metavar="PROBLEM...", help="Problem files, as written by 'qcompress formulate'.")
    ],
    target_flags: TargetFlags,
    solver: Annotated[
        list[str] | None,
        typer.Option(
            "--solver",
            "-s",
            metavar="[LABEL=]SOLVER",
            help="A solver to run, with options as in anneal:sweeps=200, or package.module:object for a solver or "
            "dimod sampler of your own. May be given several times. Default: installed solvers that need no network.",
        ),
    ] = None,
    solvers: Annotated[str | None, typer.Option(help="Names of solvers, separated by commas.")] = None,
    time_limit: arguments.TimeLimit = 10.0,
    seeds: Annotated[int, typer.Option(help="Number of runs of each solver, with seeds 0, 1, ….", min=1)] = 3,
    jobs: Annotated[
        int, typer.Option(help="Number of simultaneous runs. They share the cores; use 1 to compare times.")
    ] = 1,
    journal: arguments.JournalFile = None,
    output: Annotated[Path, arguments.folder_option("Folder for values, tables and plots.")] = Path("comparison"),
    as_json: arguments.AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a line for every run as CSV on stdout.")] = False,
) -> int:
    """Run several solvers with several seeds on one problem or many; write tables and plots of quality over time.

    An interrupted comparison resumes from its journal. The folder gets every run as JSON and as CSV, the tables as
    Markdown, and the plots.

    Example: `qcompress compare problem.npz --solver anneal:sweeps=200 --solver milp --seeds 5 --time-limit 10`
    """
    from formulations import Problem
    from solvers.compare.runs import compare as run

    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv both print on stdout; give one of them.")
    problems = {file.stem: Problem.load(file) for file in problem_files}
    if len(problems) < len(problem_files):
        raise typer.BadParameter("the problem files must have different names, because the table lists them by name.")
    asked = _asked([*(solver or []), *(solvers.split(",") if solvers else [])])

    def tell_run(label: str, solution: Solution) -> None:
        status = status_of(solution)
        result = one_line(str(solution.details["error"])) if status == ERROR else number(solution.objective)
        say(f"{label} seed {solution.seed}: {result} ({status}, {solution.wall_s:.1f} s)")

    compared: Comparison | Suite = run(
        problems if len(problems) > 1 else next(iter(problems.values())),
        asked,
        time_limit=time_limit,
        seeds=range(seeds),
        **target_flags.arguments(problems),
        jobs=jobs,
        journal=journal,
        on_run=tell_run,
    )
    unsolved = _write(compared, output)
    if as_json:
        print_json(compared.to_json())
    elif as_csv:
        print_text(compared.to_csv())
    else:
        print_compared(compared)
    return complain(unsolved) if unsolved else 0


def _asked(words: list[str]) -> list[SolverLike] | dict[str, SolverLike]:
    """Return the named solvers, by label if labels are given; without names, all that are installed."""
    from solvers import available
    from solvers.run import as_solver

    if not words:
        return [info.name for info in available() if info.available and not info.needs_network]
    arguments.find_modules_here()
    labels = [word.partition("=") for word in words]
    given = ["" if not equals or ":" in label else label for label, equals, _ in labels]
    back_ends = [as_solver(word.removeprefix(f"{label}=")) for label, word in zip(given, words, strict=True)]
    if not any(given):
        return list(back_ends)
    named = [label or solver.label for label, solver in zip(given, back_ends, strict=True)]
    if len(set(named)) < len(named):
        raise typer.BadParameter(f"the labels of --solver must differ, found {', '.join(named)}.")
    return dict(zip(named, back_ends, strict=True))


def _objectives(words: list[str] | None, what: str, problems: Mapping[str, object]) -> dict[str, float] | float | None:
    """Return objectives for `solvers.compare.compare`: a number for a single problem, otherwise by problem name."""
    if unnamed := [word for word in words or [] if "=" not in word and len(problems) > 1]:
        raise typer.BadParameter(
            f"{what} must be written NAME=VALUE for several problems ({', '.join(problems)}), found {unnamed[0]!r}."
        )
    values = arguments.amounts(
        [word if "=" in word else f"{next(iter(problems))}={word}" for word in words or []], what
    )
    if unknown := [name for name in values if name not in problems]:
        raise typer.BadParameter(f"no problem is called {unknown[0]!r}; the problems are {', '.join(problems)}.")
    if len(problems) == 1 and values:
        return next(iter(values.values()))
    return values or None


def _share(text: str) -> float:
    """Convert ``1%`` or ``0.01`` to a number."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise typer.BadParameter(f"--within must be a share such as 1% or 0.01, found {text!r}.") from error


def _write(compared: Comparison | Suite, output: Path) -> str:
    """Write values, tables and plots into the folder; if no run found a choice, return what to do."""
    from formulations.files import replacing

    output.mkdir(parents=True, exist_ok=True)
    stem = "comparison" if isinstance(compared, Comparison) else "suite"
    compared.save(output / f"{stem}.json")
    for name, text in (("comparison.md", compared.to_markdown()), ("runs.csv", compared.to_csv())):
        with replacing(output / name) as file:
            file.write(text.encode())
    comparisons = [compared] if isinstance(compared, Comparison) else list(compared.comparisons.values())
    unsolved = all(comparison.best is None for comparison in comparisons)
    plots = [] if unsolved else _drawn(compared, output)
    say(f"wrote to {output}: {', '.join([f'{stem}.json', 'comparison.md', 'runs.csv', *plots])}")
    if unsolved and all(comparison.infeasible for comparison in comparisons):
        return "no choice is within the budgets, which is proven; raise a budget"
    return "no solver found a choice within the budgets; raise a budget or allow more time" if unsolved else ""


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
