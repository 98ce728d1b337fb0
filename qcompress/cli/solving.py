"""``solvers``, ``solve``, ``compare``: what needs a problem file and no model."""

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import amount, complain, number, percent, print_json, print_lines, print_table, say
from qcompress.cli.explaining import explain
from qcompress.cli.progress import watching
from qcompress.cli.sampling import print_sampling
from solvers import Solution, SolverInfo
from solvers.compare.runs import TARGET, Comparison, Suite

ProblemFile = Annotated[
    Path, typer.Argument(metavar="PROBLEM", help="A problem file, as 'qcompress formulate' writes.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this family."""
    app.command()(solvers)
    app.command()(solve)
    app.command()(compare)


def solvers(as_json: arguments.AsJson = False) -> None:
    """List the solvers: which are here, what they can do, and their options.

    Example: `qcompress solvers`
    """
    from dataclasses import asdict

    from solvers import available

    infos = [_with_token(info) for info in available()]
    if as_json:
        print_json([asdict(info) for info in infos])
        return
    rows = []
    for info in infos:
        able = [("proves", info.exact), ("pairs", info.native_pairs), ("network", info.needs_network)]
        options = ", ".join(f"{name}={default!r}" for name, default in info.options.items())
        about = info.summary if info.available else f"{info.summary} [{info.why_not}]"
        here = "yes" if info.available else "no"
        rows.append((info.name, here, ", ".join(word for word, is_so in able if is_so), about, options))
    print_table(("solver", "here", "can", "summary", "options"), rows)


def _with_token(info: SolverInfo) -> SolverInfo:
    """Not available, for a solver of the service whose API token is configured nowhere. Asks no network."""
    if not (info.needs_network and info.available):
        return info
    from dataclasses import replace

    from solvers.leap.connection import missing_token

    why = missing_token()
    return replace(info, available=not why, why_not=why)


def solve(
    problem_file: ProblemFile,
    solver: arguments.SolverName = "auto",
    time_limit: arguments.TimeLimit = 60.0,
    seed: arguments.Seed = 0,
    option: arguments.SolverOptions = None,
    initial: Annotated[Path | None, typer.Option(help="A solution file to start from.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: PROBLEM's name with .solution.json.")
    ] = None,
    as_json: arguments.AsJson = False,
) -> int:
    """Solve a problem: choose one option for every part within the budgets.

    Ctrl-C ends the run with the best choice so far. Where no choice is found, the budgets that clash are printed, and
    what would be enough.

    Example: `qcompress solve problem.npz --solver anneal --time-limit 10`
    """
    from formulations import InfeasibleBudgetError, Problem
    from solvers import solve as run

    problem = Problem.load(problem_file)
    start = None if initial is None else Solution.load(initial).choice
    options = arguments.assignments(option or [], "--option")
    try:
        with watching(f"solving with {solver}") as watch:
            solution = run(
                problem, solver, time_limit=time_limit, seed=seed, initial=start, on_progress=watch.solved, **options
            )
    except InfeasibleBudgetError:
        explain(problem, as_json=as_json)
        raise
    target = problem_file.with_suffix(".solution.json") if output is None else output
    solution.save(target)
    say(f"written: {target}")
    unexplained = solution.choice is None and solution.stop_reason != "INTERRUPTED"
    if not as_json:
        print_solution(solution, dict(problem.budgets))
    elif not unexplained:
        print_json(solution.to_json())
    if unexplained:
        explain(problem, solution.to_json(), as_json=as_json)
    if solution.choice is None:
        return complain(
            f"solver {solution.solver!r} found no choice within the budgets ({solution.status}); "
            "raise a budget or allow more time"
        )
    return 0


def print_solution(solution: Solution, budgets: dict[str, float]) -> None:
    """The answer in a few lines; ``budgets`` may be empty when they are not known."""
    stopped = "" if solution.stop_reason == "COMPLETED" else f", stopped: {solution.stop_reason}"
    rows = [
        ("status", f"{solution.status} (by {solution.solver} in {solution.wall_s:.2f} s{stopped})"),
        ("objective", number(solution.objective, 9)),
        ("bound", number(solution.bound, 9)),
        ("gap", percent(solution.gap)),
    ]
    for name, used in solution.usage.items():
        limit = f" of {amount(budgets[name])}" if name in budgets else ""
        rows.append((name, amount(used) + limit))
    print_table(("", ""), rows)
    print_sampling(solution)


def compare(
    problem_files: Annotated[
        list[Path], typer.Argument(metavar="PROBLEM...", help="Problem files, as 'qcompress formulate' writes.")
    ],
    solver: Annotated[
        list[str] | None, typer.Option("--solver", "-s", help="A solver to run. Default: every one that is here.")
    ] = None,
    time_limit: arguments.TimeLimit = 10.0,
    seeds: Annotated[int, typer.Option(help="Runs of each solver, with seeds 0, 1, ….", min=1)] = 3,
    jobs: Annotated[
        int, typer.Option(help="Runs at the same time. They share the cores: leave 1 where times are compared.")
    ] = 1,
    journal: arguments.JournalFile = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for values, table and plots.")] = Path(
        "comparison"
    ),
    as_json: arguments.AsJson = False,
) -> int:
    """Run several solvers with several seeds on one problem or many: a table, and plots of who had what when.

    Example: `qcompress compare problem.npz --solver anneal --solver milp --seeds 5 --time-limit 10`
    """
    from formulations import Problem
    from formulations.files import replacing
    from solvers import available
    from solvers.compare.runs import compare as run

    problems = {file.stem: Problem.load(file) for file in problem_files}
    if len(problems) < len(problem_files):
        raise typer.BadParameter("the problem files must differ in their names, which stand for them in the table.")
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
    unsolved = all(one.best is None for one in comparisons)
    plots = [] if unsolved else _drawn(compared, output)
    say(f"written to {output}: {', '.join([value_file, 'comparison.md', *plots])}")
    if as_json:
        print_json(compared.to_json())
    else:
        print_compared(compared)
    if unsolved:
        return complain("no solver found a choice within the budgets; raise a budget or allow more time")
    return 0


def _drawn(compared: Comparison | Suite, output: Path) -> list[str]:
    """The names of the plots that were drawn; none, and a word why, without matplotlib."""
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


def print_compared(compared: Comparison | Suite) -> None:
    """The table of a comparison, or of a suite and each of its problems."""
    if isinstance(compared, Comparison):
        print_comparison(compared)
        return
    rows = []
    for row in compared.rows():
        shares = [f"{share:.0%}" for share in (row.target_share, row.proven_share, row.feasible_share)]
        rows.append((row.label, str(row.problems), *shares, percent(row.gap), f"{row.wall_s:.2f} s"))
    columns = (f">within {TARGET:.0%} of best", ">proven", ">feasible", ">median gap", ">time")
    print_table(("solver", ">problems", *columns), rows)
    for name, comparison in compared.comparisons.items():
        print_lines("", name)
        print_comparison(comparison)


def print_comparison(comparison: Comparison) -> None:
    """The table of a comparison."""
    rows = []
    for row in comparison.rows():
        statuses = ", ".join(f"{status} ×{count}" for status, count in row.statuses.items())
        reached = row.to_target
        values = [
            number(row.median),
            number(row.best),
            percent(row.gap),
            f"{row.feasible_share:.0%}",
            f"{row.wall_s:.2f} s",
            "–" if reached is None or reached.seconds is None else f"{reached.seconds:.2g} s",
        ]
        rows.append((row.label, *values, statuses))
    columns = (">median objective", ">best", ">gap to bound", ">feasible", ">time", f">to {TARGET:.0%}", "status")
    print_table(("solver", *columns), rows)
    print_lines(f"best objective {number(comparison.best)}, best bound {number(comparison.bound)}")
    print_lines(*(f"not run: {label} ({why})" for label, why in comparison.skipped.items()))
    print_lines(*(f"failed: {run} ({why})" for run, why in comparison.errors.items()))
