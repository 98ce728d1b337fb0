"""``qcompress sweep``: the curve, its plot and its journal."""

import json
from pathlib import Path

import pytest
import scipy.sparse

from formulations import Problem
from qcompress.cli.report import _swept
from solvers.sweep import Sweep
from tests.cli.zoo import ran


def test_sweep_leaves_curve_and_plot_and_goes_on_from_its_journal(folder, problem_file, capsys):
    pytest.importorskip("matplotlib")
    words = ["sweep", problem_file, "--resource", "bytes", "--points", "4", "--journal", "points.jsonl"]
    ran([*words, "--plot", "curve.png"])
    out, err = capsys.readouterr()
    assert err.count("bytes ") == out.count("OPTIMAL") == 4
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    curve = Sweep.load("problem.sweep.json")
    assert len(curve.points) == 4
    ran(["show", "problem.sweep.json"])
    assert capsys.readouterr().out == out
    ran([*words, "--json"])
    out, err = capsys.readouterr()
    assert "OPTIMAL" not in err
    assert json.loads(out) == json.loads((folder / "problem.sweep.json").read_text())
    budgets = f"{curve.points[1].budget},{curve.points[2].budget}"
    ran(["sweep", problem_file, "--budgets", budgets, "--solver", "anneal", "--option", "sweeps=9", "-o", "two.json"])
    two = Sweep.load("two.json")
    assert [point.budget for point in two.points] == [curve.points[1].budget, curve.points[2].budget]
    assert (two.solver, two.points[0].solution.options["sweeps"]) == ("anneal", 9)


def test_sweep_and_report_take_budgets_with_pair_terms(folder, capsys):
    terms = scipy.sparse.csr_array(([4.0, 2.0], ([0, 0], [2, 3])), shape=(4, 4))
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 2, 0, 3], {"m": [1] * 4}, {"m": 6}, resource_pairs={"m": terms})
    problem.save("paired.npz")
    ran(["sweep", "paired.npz", "--resource", "m", "--budgets", "4,6"])
    assert capsys.readouterr().out.count("OPTIMAL") == 2
    assert {str(point.solution.status) for point in _swept(Path("paired.npz"), 5.0).points} == {"OPTIMAL"}
