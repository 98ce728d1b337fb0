"""Why budgets cannot be met, against every choice; and what is said when time does not suffice."""

import ctypes
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import Problem, explain_infeasibility
from formulations.feasibility.explain import Infeasibility
from formulations.generators.random_instances import small_problem
from qcompress.cli import main
from qcompress.cli.explaining import stdout_to_stderr

CLASHING = Problem(
    ["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], {"bytes": [8, 4, 8, 4], "seconds": [1, 3, 1, 3]},
    {"bytes": 8, "seconds": 2},
)  # fmt: skip


def tightened(seed: int) -> Problem:
    """A small problem with one to three budgets, each somewhat above or below what is reachable alone."""
    rng = np.random.default_rng(seed)
    problem = small_problem(seed, max_groups=4)
    uses = {f"r{k}": rng.integers(0, 9, problem.num_options).astype(float) for k in range(rng.integers(1, 4))}
    if rng.random() < 0.3:
        uses = {name: use * rng.random(len(use)) for name, use in uses.items()}
    loose = Problem(problem.groups, problem.options, problem.cost, uses, {}, problem.pairs)
    least = loose.minimum_usage()
    return loose.with_budgets(**{name: np.round(least[name] * rng.uniform(0.9, 1.6), 2) for name in uses})


def usages(problem: Problem) -> list[dict[str, float]]:
    """What every choice uses."""
    choices = itertools.product(*(range(len(options)) for options in problem.options))
    return [problem.evaluate(choice).usage for choice in choices]


def holds(problem: Problem, usage: dict[str, float], names: object) -> bool:
    return all(usage[name] <= problem.budgets[name] * (1 + 1e-12) for name in names)


def assert_explained(problem: Problem, why: Infeasibility) -> None:
    every, names = usages(problem), list(problem.budgets)
    feasible = any(holds(problem, usage, names) for usage in every)
    assert why.feasible is feasible
    for one in why.budgets:
        others = [name for name in names if name != one.name]
        within = [usage[one.name] for usage in every if holds(problem, usage, others)]
        assert one.alone == pytest.approx(min(usage[one.name] for usage in every))
        if within:
            assert one.lower <= min(within) + 1e-12
            assert one.lower == pytest.approx(min(within), abs=1e-4)
            assert one.upper == pytest.approx(min(within), abs=1e-4)
        else:
            assert (one.lower, one.upper) == (None, None)
    if feasible:
        assert (why.clash, why.relaxation) == ((), None)
        return
    assert not any(holds(problem, usage, why.clash) for usage in every)
    assert why.minimal
    for name in why.clash:
        rest = [other for other in why.clash if other != name]
        assert any(holds(problem, usage, rest) for usage in every)
    assert {group.budget for group in why.pinned} <= set(why.clash)
    assert_least_factor(problem, why, every)


def assert_least_factor(problem: Problem, why: Infeasibility, every: list[dict[str, float]]) -> None:
    def least(grown: list[str]) -> float | None:
        rest = [name for name in problem.budgets if name not in grown]
        within = [usage for usage in every if holds(problem, usage, rest)]
        if not grown or not within:
            return None
        return min(max(usage[name] / problem.budgets[name] for name in grown) for usage in within)

    positive = [name for name, budget in problem.budgets.items() if budget > 0]
    for grown in ([name for name in positive if name in why.clash], positive):
        if (factor := least(grown)) is not None:
            assert why.relaxation.budgets == tuple(grown)
            assert why.relaxation.factor == pytest.approx(factor, rel=1e-5)
            assert why.relaxation.lower <= factor
            larger = {name: problem.budgets[name] * why.relaxation.factor for name in grown}
            assert holds(problem.with_budgets(**larger), why.relaxation.usage, problem.budgets)
            return
    assert why.relaxation is None


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_number_is_that_of_the_best_choice(seed):
    problem = tightened(seed)
    assert_explained(problem, explain_infeasibility(problem))


def test_a_budget_of_zero_cannot_grow_by_a_factor():
    problem = CLASHING.with_budgets(bytes=0)
    why = explain_infeasibility(problem)
    assert (why.clash, why.relaxation) == (("bytes",), None)
    assert "No factor was found" in str(why)


def test_one_byte_in_many_decides():
    """Uses of a gigabyte that miss the budget by one byte are told from those that meet it."""
    uses = {"bytes": [2**30, 2**30 - 2, 2**30, 2**30 - 2], "seconds": [1, 3, 1, 3]}
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], uses, {"bytes": 2**31 - 3, "seconds": 4})
    why = explain_infeasibility(problem)
    assert why.feasible is False
    assert why.budgets[0].upper == 2**31 - 2
    assert explain_infeasibility(problem.with_budgets(bytes=2**31 - 2)).feasible is True


def test_what_is_fixed_counts_and_is_named():
    uses = {"bytes": [8, 4, 8, 4], "seconds": [1, 3, 1, 3]}
    fixed = {"bytes": 10.0}
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0] * 4, uses, {"bytes": 18, "seconds": 2}, fixed=fixed)
    why = explain_infeasibility(problem)
    assert (why.clash, why.fixed) == (("bytes", "seconds"), fixed)
    assert (why.budgets[0].alone, why.budgets[0].upper) == (18.0, 26.0)
    enough = {name: budget * why.relaxation.factor for name, budget in problem.budgets.items()}
    assert holds(problem.with_budgets(**enough), why.relaxation.usage, why.relaxation.budgets)
    assert why.relaxation.usage["bytes"] in (18.0, 22.0, 26.0)
    assert "10 bytes are used whatever is chosen." in str(why)


def test_pinned_groups_are_named():
    uses = {"bytes": [100, 1, 2, 30, 40]}
    problem = Problem(["head", "a", "b"], [["keep"], ["x", "y"], ["x", "y"]], [0.0] * 5, uses, {"bytes": 110})
    why = explain_infeasibility(problem)
    assert [(group.group, group.num_options, group.smallest) for group in why.pinned] == [
        ("head", 1, 100.0),
        ("b", 2, 30.0),
        ("a", 2, 1.0),
    ]
    assert "head takes 100 bytes (76% of the smallest use): its only option." in str(why)


def test_the_text_names_the_clash_and_what_is_enough():
    assert str(explain_infeasibility(CLASHING)).splitlines()[:5] == [
        "No choice meets the budgets for bytes, seconds together; without any one of them the rest can be met.",
        "budget   asked  smallest alone  smallest while the others hold",
        "bytes        8               8                              16",
        "seconds      2               2                               6",
        "Multiplying bytes, seconds by 2 is enough: a choice uses bytes 12, seconds 4.",
    ]


def test_no_time_claims_nothing():
    why = explain_infeasibility(CLASHING, time_limit=1e-9)
    assert why.feasible is None
    assert [(one.lower, one.upper) for one in why.budgets] == [(8.0, None), (2.0, None)]
    assert (why.clash, why.minimal, why.relaxation) == ((), False, None)
    assert "the time limit came first" in str(why)
    assert "at least 8" in str(why)


def test_a_problem_of_many_groups_is_explained():
    rng = np.random.default_rng(0)
    uses = {name: rng.integers(1, 1000, 2400).astype(float) for name in ("bytes", "seconds", "macs")}
    problem = Problem([f"g{g}" for g in range(400)], [list("abcdef")] * 400, np.zeros(2400), uses, {})
    least = problem.minimum_usage()
    problem = problem.with_budgets(bytes=least["bytes"] * 1.2, seconds=least["seconds"] * 1.2, macs=least["macs"] * 9)
    why = explain_infeasibility(problem, time_limit=10)
    assert why.feasible is False
    assert why.clash == ("bytes", "seconds")
    assert why.relaxation.lower <= why.relaxation.factor <= why.relaxation.lower * 1.001


# --- the command line ------------------------------------------------------------------------------------------------


def test_solve_prints_why(tmp_path, capsys):
    CLASHING.save(tmp_path / "p.npz")
    assert main(["solve", str(tmp_path / "p.npz"), "--solver", "brute-force"]) == 1
    said = capsys.readouterr()
    assert "INFEASIBLE" in said.out
    assert "No choice meets the budgets for bytes, seconds together" in said.err
    assert "found no choice within the budgets (INFEASIBLE)" in said.err


@pytest.mark.parametrize("budget", [8, 7])
def test_solve_gives_why_as_json(tmp_path, capsys, budget):
    CLASHING.with_budgets(bytes=budget).save(tmp_path / "p.npz")
    assert main(["solve", str(tmp_path / "p.npz"), "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["infeasibility"]["clash"] == (["bytes", "seconds"] if budget == 8 else ["bytes"])
    assert value.get("status") == ("INFEASIBLE" if budget == 8 else None)


def test_compress_prints_why(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo_of_one.py").write_text(
        "import torch\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))\n"
        "def batches(): return [torch.arange(96.0).reshape(16, 6)]\n"
    )
    command = ["compress", "zoo_of_one:net", "zoo_of_one:batches", "--budget", "bytes=10", "--output", "run"]
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "No choice meets the budget for bytes" in said.err
    assert "smallest possible use" in said.err
    assert main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["infeasibility"]["clash"] == ["bytes"]


def test_what_a_library_prints_stays_out_of_stdout(capfd):
    with stdout_to_stderr():
        ctypes.CDLL(None).puts(b"chatter")
    ctypes.CDLL(None).puts(b"result")
    ctypes.CDLL(None).fflush(None)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("result\n", "chatter\n")
