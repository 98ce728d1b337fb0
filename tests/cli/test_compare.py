"""``qcompress compare``: tables, plots, journals and solvers of one's own."""

import json

import pytest

from formulations import Problem
from formulations.generators.random_instances import layered_problem
from qcompress.cli import main
from solvers.compare.runs import Comparison, Suite
from tests.cli.zoo import ran


def test_compare_leaves_table_values_and_plot(folder, problem_file, capsys):
    pytest.importorskip("matplotlib")
    words = ["--solver", "brute-force", "--solver", "greedy", "--seeds", "2", "--output", "out"]
    ran(["compare", problem_file, *words])
    comparison = Comparison.load("out/comparison.json")
    assert list(comparison.solutions) == ["brute-force", "greedy"]
    assert comparison.seeds == (0, 1)
    assert (folder / "out/comparison.md").read_text() == comparison.to_markdown()
    assert (folder / "out/anytime.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "OPTIMAL ×2" in shown
    ran(["show", "out/comparison.json"])
    assert capsys.readouterr().out.strip() in shown


def test_a_best_known_value_that_no_run_reaches_leaves_the_table_and_an_empty_profile(folder, problem_file, capsys):
    pytest.importorskip("matplotlib")
    words = ["--solver", "greedy", "--seeds", "1", "--best-known", "-1e6", "--csv", "--output", "out"]
    ran(["compare", problem_file, *words])
    assert capsys.readouterr().out.startswith("problem,solver,")
    assert (folder / "out/profile.png").read_bytes().startswith(b"\x89PNG")


def test_the_line_of_a_failed_run_says_error_and_why(problem_file, capsys):
    main(["compare", problem_file, "--solver", "tests.compare.own_solvers:Broken", "--output", "out"])
    assert "broken seed 0: ArithmeticError: the cogwheel is stuck (ERROR, " in capsys.readouterr().err


def test_compare_takes_several_problems_and_goes_on_from_its_journal(folder, problem_file, capsys):
    layered_problem(4, bits=(2, 4), rank=0).save(folder / "linear.npz")
    words = ["compare", problem_file, "linear.npz", "--solver", "greedy", "--seeds", "2", "--output", "out"]
    words += ["--journal", "runs.jsonl"]
    ran(words)
    assert capsys.readouterr().err.count("linear: greedy seed") == 2
    ran(words)
    out, err = capsys.readouterr()
    assert "greedy seed" not in err
    suite = Suite.load("out/suite.json")
    assert list(suite.comparisons) == ["problem", "linear"]
    assert len((folder / "runs.jsonl").read_text().splitlines()) == 4
    ran(["show", "out/suite.json"])
    assert capsys.readouterr().out.strip() in out


OWN_SOLVERS = """
import dimod

TRIES = dimod.ExactSolver()
"""


def test_compare_takes_options_labels_import_paths_and_a_target(folder, problem_file, capsys):
    (folder / "mine_for_cli.py").write_text(OWN_SOLVERS)
    words = ["compare", problem_file, "--solver", "anneal:sweeps=5", "--solver", "more=anneal:sweeps=9"]
    words += ["--solver", "mine_for_cli:TRIES", "--solvers", "greedy,dp", "--seeds", "1", "--output", "out"]
    ran([*words, "--best-known", "-1", "--target", "problem=1e9", "--within", "0.5%"])
    compared = Comparison.load("out/comparison.json")
    assert list(compared.solutions) == ["anneal(sweeps=5)", "more", "ExactSolver", "greedy"]
    assert "dp" in compared.skipped
    assert (compared.best_known, compared.stated_target, compared.within) == (-1.0, 1e9, 0.005)
    assert "Best objective" in capsys.readouterr().out
    ran([*words, "--csv"])
    printed = capsys.readouterr().out
    assert printed == (folder / "out/runs.csv").read_text()
    assert len(printed.splitlines()) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--solver", "a=dp", "--solver", "a=milp"], "labels of --solver must differ"),
        (["--solver", "dp", "--within", "much"], "--within must be a share"),
        (["--solver", "dp", "--best-known", "a lot"], "must be a number"),
        (["--solver", "dp", "--target", "nan"], "--target problem must be a number, for example problem=0.15"),
        (["--solver", "dp", "--target", "other=1"], "no problem is called 'other'; the problems are problem"),
        (["--solver", "dp", "--json", "--csv"], "give one of them"),
        (["--solver", "nowhere_at_all:it"], "no module is called 'nowhere_at_all'"),
    ],
)
def test_compare_refuses_what_it_cannot_mean(words, message, folder, problem_file, capsys):
    assert main(["compare", problem_file, "--seeds", "1", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_one_target_for_several_problems_is_refused(folder, problem_file, capsys):
    layered_problem(4, bits=(2, 4), rank=0).save(folder / "linear.npz")
    assert main(["compare", problem_file, "linear.npz", "--solver", "dp", "--target", "3"]) == 2
    assert "--target must be written NAME=VALUE for several problems (problem, linear)" in capsys.readouterr().err


def test_an_impossible_problem_is_rows_and_ends_nothing(folder, problem_file, capsys):
    Problem.load(problem_file).with_budgets(bytes=1).save(folder / "impossible.npz")
    words = ["--solver", "greedy", "--seeds", "1", "--output", "out"]
    ran(["compare", problem_file, "impossible.npz", *words])
    assert "Proven: no choice meets the budget for bytes: asked for at most 1" in capsys.readouterr().out
    assert Suite.load("out/suite.json")["problem"].best is not None
    assert main(["compare", "impossible.npz", *words, "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["solutions"]["greedy"][0]["status"] == "INFEASIBLE"
    assert "no choice is within the budgets, which is proven" in err
