"""``solve``: choose one option for every part of a problem, within its budgets."""

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli import arguments
from qcompress.cli.console import complain, print_json, say
from qcompress.cli.explaining import explain
from qcompress.cli.printing import print_solution
from qcompress.cli.progress import watching
from solvers import Solution


def solve(
    problem_file: arguments.ProblemFile,
    solver: arguments.SolverName = "auto",
    time_limit: arguments.TimeLimit = 60.0,
    seed: arguments.Seed = 0,
    option: arguments.SolverOptions = None,
    initial: Annotated[Path | None, typer.Option(help="A solution file to start from.")] = None,
    output: Annotated[Path | None, arguments.output_option("Default: PROBLEM's name with .solution.json.")] = None,
    as_json: arguments.AsJson = False,
) -> int:
    """Solve a problem: choose one option for every part within the budgets.

    Ctrl-C ends the run with the best choice so far. If no choice is found, the conflicting budgets are printed, and
    budgets that would be enough.

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
    say(f"wrote {target}")
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
