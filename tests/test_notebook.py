"""In a notebook, values show what the command line prints of them."""

from formulations.generators.random_instances import layered_problem
from solvers import solve
from solvers.compare import compare
from solvers.sweep import sweep

PROBLEM = layered_problem(4, bits=(2, 4, 8), rank=2)


def test_a_problem_shows_its_size_and_budgets():
    shown = PROBLEM._repr_markdown_()
    assert shown.startswith("Problem: 4 groups, 12 options")
    assert f"| bytes | {PROBLEM.minimum_usage()['bytes']:,.0f} | {PROBLEM.budgets['bytes']:,.0f} |" in shown


def test_a_solution_shows_what_is_known_of_it():
    solution = solve(PROBLEM, "brute-force")
    shown = solution._repr_markdown_()
    assert "OPTIMAL (by brute-force in " in shown
    assert f"{solution.objective:.6g}"[:6] in shown
    assert "| bytes |" in shown


def test_comparisons_and_sweeps_show_their_tables():
    comparison = compare(PROBLEM, ["greedy"])
    assert comparison._repr_markdown_() == comparison.to_markdown()
    suite = compare({"one": PROBLEM}, ["greedy"])
    assert suite._repr_markdown_() == suite.to_markdown()
    curve = sweep(PROBLEM, "bytes", 3, solver="greedy")
    assert curve._repr_markdown_() == curve.to_markdown()
