"""``qcompress solve``: options, interrupts, and problems without an answer."""

import pytest
import scipy.sparse

import qcompress.cli
from formulations import Problem
from qcompress.cli import main
from solvers import Solution, StopReason
from tests.cli.zoo import ran


def test_solve_passes_seed_options_and_start_on(folder, problem_file, capsys):
    ran(["solve", problem_file, "--solver", "brute-force", "--output", "first.json"])
    words = ["--seed", "5", "--option", "generations=2", "--initial", "first.json", "--output", "second.json"]
    ran(["solve", problem_file, "--solver", "anneal", *words])
    first, second = Solution.load("first.json"), Solution.load("second.json")
    assert (second.solver, second.seed, second.options["generations"]) == ("anneal", 5, 2)
    assert second.objective == first.objective


def test_an_interrupted_solve_writes_the_best_so_far(folder, problem_file, monkeypatch, capsys):
    def interrupt(watch, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(qcompress.cli.progress.Watch, "solved", interrupt)
    ran(["solve", problem_file, "--solver", "brute-force"])
    solution = Solution.load("problem.solution.json")
    assert solution.stop_reason is StopReason.INTERRUPTED
    assert solution.feasible
    assert "stopped: INTERRUPTED" in capsys.readouterr().out


def test_a_problem_without_an_answer_is_an_error_but_leaves_the_solution(folder, capsys):
    uses = {"bytes": [8, 4, 8, 4], "seconds": [1, 3, 1, 3]}
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], uses, {"bytes": 8, "seconds": 2})
    problem.save("p.npz")
    assert main(["solve", "p.npz", "--solver", "brute-force"]) == 1
    assert "found no choice within the budgets (INFEASIBLE)" in capsys.readouterr().err
    assert Solution.load("p.solution.json").choice is None
    assert main(["compare", "p.npz", "--solver", "brute-force"]) == 1
    assert "no choice is within the budgets, which is proven" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "said"), [
    (1, "asked for at most 1, the smallest possible use is 2"),
    (2, "found no choice within the budgets (INFEASIBLE)"),
])  # fmt: skip
def test_budgets_with_pair_terms_are_not_explained_but_their_error_is_told(seconds, said, folder, capsys):
    uses = {"bytes": [8, 4, 8, 4], "seconds": [1, 3, 1, 3]}
    pairs = {"bytes": scipy.sparse.csr_array(([1.0], ([0], [2])), shape=(4, 4))}
    budgets = {"bytes": 8, "seconds": seconds}
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], uses, budgets, resource_pairs=pairs)
    problem.save("p.npz")
    for words in ([], ["--json"]):
        assert main(["solve", "p.npz", "--solver", "brute-force", *words]) == 1
        captured = capsys.readouterr()
        assert said in captured.err
        assert "explain_infeasibility" not in captured.err + captured.out
