"""Print solutions and comparisons as tables."""

from formulations.formatting import amount, number, percent
from qcompress.cli.console import print_lines, print_table
from qcompress.cli.sampling import print_sampling
from solvers import Solution
from solvers.compare.suite import Suite, suite_cells
from solvers.compare.tables import Comparison, until


def print_solution(solution: Solution, budgets: dict[str, float]) -> None:
    """Print a solution in a few lines; ``budgets`` may be empty if unknown."""
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


def print_compared(compared: Comparison | Suite) -> None:
    """Print the table of a comparison, or of a suite and each of its problems."""
    if isinstance(compared, Comparison):
        print_comparison(compared)
        return
    columns = (
        f">to {compared.target_words}",
        ">proven",
        ">feasible",
        ">median gap",
        ">time",
        ">mean",
        ">mean to target",
    )
    print_table(("solver", ">problems", *columns), map(suite_cells, compared.rows()))
    for name, comparison in compared.comparisons.items():
        print_lines("", name)
        print_comparison(comparison)


def print_comparison(comparison: Comparison) -> None:
    """Print the table of a comparison."""
    rows = []
    for row in comparison.rows():
        statuses = ", ".join(f"{status} ×{count}" for status, count in row.statuses.items())
        values = [
            number(row.median),
            number(row.best),
            percent(row.above_best),
            percent(row.gap),
            f"{row.feasible_share:.0%}",
            f"{row.wall_s:.2f} s",
            until(row.to_target),
        ]
        rows.append((row.label, *values, statuses))
    columns = (
        ">median",
        ">best",
        ">above best",
        ">gap to bound",
        ">feasible",
        ">time",
        f">to {comparison.target_words}",
    )
    print_table(("solver", *columns, "status"), rows)
    print_lines(*comparison.notes())
