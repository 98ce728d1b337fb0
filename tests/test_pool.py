"""`pool`: the choices brute force would list, all within the budgets, near the best and apart from each other."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from formulations import InfeasibleBudgetError, Problem
from formulations.generators.random_instances import layered_problem, small_problem
from solvers import InvalidOptionError, Solution, Solver, Status, StopReason, UnknownSolverError
from solvers.heuristic.anneal import Anneal
from solvers.heuristic.greedy import Greedy
from solvers.heuristic.lagrangian import Lagrangian
from solvers.pool import pool


def listed(problem, k, within, distance):
    """The pool by looking at every choice: each the best of those far enough from all before it."""
    judged = [
        (problem.evaluate(choice), choice) for choice in itertools.product(*(range(len(o)) for o in problem.options))
    ]
    ranked = sorted((found.objective, choice) for found, choice in judged if found.feasible)
    members = []
    for objective, choice in ranked:
        apart = all(sum(a != b for a, b in zip(choice, other, strict=True)) >= distance for _, other in members)
        if len(members) < k and apart and objective <= ranked[0][0] + within * abs(ranked[0][0]):
            members.append((objective, choice))
    return members


def distances(choices):
    return [int((np.array(a) != np.array(b)).sum()) for a, b in itertools.combinations(choices, 2)]


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_list_of_brute_force(seed):
    problem = small_problem(seed, max_groups=5)
    if len(set(np.round(problem.cost, 9))) < problem.num_options:
        problem = problem.derived(cost=problem.cost + 1e-3 * np.random.default_rng(seed).random(problem.num_options))
    for k, within, distance in ((4, 0.5, 1), (3, 10.0, 2), (50, 0.2, 1)):
        if distance > problem.num_groups:
            continue
        found, expected = pool(problem, k, within=within, distance=distance), listed(problem, k, within, distance)
        assert [choice for choice, _ in found.pool] == [choice for _, choice in expected]
        assert [value for _, value in found.pool] == pytest.approx([value for value, _ in expected], abs=1e-9)
        assert found.details["pool"]["proven"]


@pytest.mark.parametrize("solver", [Anneal(sweeps=300, generations=5), Lagrangian(), Greedy()])
def test_what_a_heuristic_finds_is_near_apart_feasible_and_sorted(solver):
    problem = layered_problem(30, seed=4)
    found = pool(problem, 5, within=0.05, distance=6, solver=solver, seed=0)
    choices, values = [choice for choice, _ in found.pool], [value for _, value in found.pool]
    assert len(choices) == 5 or solver.name == "greedy"
    assert min(distances(choices), default=6) >= 6
    assert values == sorted(values)
    assert values[-1] <= values[0] * 1.05
    for choice, value in found.pool:
        judged = problem.evaluate(choice)
        assert (judged.feasible, judged.objective) == (True, value)
    assert found.pool[0] == (tuple(found.choice.tolist()), found.objective)
    assert found.problem_fingerprint == problem.fingerprint()
    assert not found.details["pool"]["proven"]


def test_the_time_limit_is_for_all_of_it():
    found = pool(layered_problem(30, seed=4), 10**6, within=9.0, solver="greedy", time_limit=0.2)
    assert found.details["pool"]["stopped"] == "time limit"
    assert not found.details["pool"]["proven"]
    assert 1 <= len(found.pool) < 10**5


@dataclass(frozen=True)
class Pressed(Solver):
    """Greedy, but Ctrl-C is pressed in the second run, after its choice."""

    name = "pressed"
    summary = "greedy until Ctrl-C"
    presolved = False
    runs = []  # noqa: RUF012

    def run(self, problem, search):
        self.runs.append(1)
        Greedy().run(problem, search)
        if len(self.runs) == 2:
            raise KeyboardInterrupt


def test_ctrl_c_ends_all_of_it_with_the_choices_so_far():
    Pressed.runs.clear()
    found = pool(layered_problem(10, seed=4), 5, within=9.0, solver=Pressed())
    assert (found.stop_reason, len(Pressed.runs), len(found.pool)) == (StopReason.INTERRUPTED, 2, 2)
    assert (found.details["pool"]["stopped"], found.details["pool"]["proven"]) == ("interrupted", False)


def test_a_better_choice_found_on_the_way_becomes_the_best():
    """A solver that first finds a poor choice; the pool is measured against the best it has in the end."""
    runs = []

    @dataclass(frozen=True)
    class Slow(Solver):
        name = "slow"
        summary = "better every time"
        presolved = False  # the options it picks are the problem's own

        def run(self, problem, search):
            runs.append(1)
            search.choice = search._evaluation = None
            search.offer([3 - len(runs), 0])

    problem = Problem(["a", "b"], [["x", "y", "z"], ["x", "y"]], [1, 2, 8, 0, 9], {}, {})
    found = pool(problem, 3, within=1.0, solver=Slow)
    assert [value for _, value in found.pool] == [1.0, 2.0]  # 8 is too far from 1
    assert (found.objective, found.choice.tolist()) == (1.0, [0, 0])


def test_the_end_is_explained():
    alone = Problem(["a", "b"], [["x"], ["x"]], [0, 0], {}, {})
    found = pool(alone, 3)
    assert (found.pool, found.details["pool"]["stopped"]) == (((((0, 0), 0.0)),), "no other choice differs enough")
    two = Problem(["a"], [["x", "y"]], [1, 5], {}, {})
    assert pool(two, 2, within=0.5).details["pool"]["stopped"] == "no other choice is near enough"
    assert pool(two, 2, within=9).details["pool"]["stopped"] == "all found"
    assert pool(two, 3, within=9).details["pool"]["stopped"] == "no other choice differs enough"
    together = Problem(["a"], [["x", "y"]], [0, 0], {"s": [1, 0], "t": [0, 1]}, {"s": 0, "t": 0})
    none = pool(together, 3)
    assert (none.status, none.pool, none.details["pool"]["stopped"]) == (Status.INFEASIBLE, (), "no choice found")


def test_resources_of_the_same_name_are_no_trouble():
    use = {"groups as in choice 0": [1, 2, 3]}
    problem = Problem(["a"], [["x", "y", "z"]], [1, 2, 3], use, {"groups as in choice 0": 2})
    assert [value for _, value in pool(problem, 3, within=9).pool] == [1.0, 2.0]


def test_it_comes_back_from_its_file(tmp_path):
    found = pool(small_problem(2), 3, within=2.0)
    found.save(tmp_path / "solution.json")
    loaded = Solution.load(tmp_path / "solution.json")
    assert (loaded.pool, loaded.details) == (found.pool, found.details)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"k": 0}, InvalidOptionError, "found k=0"),
        ({"k": 2, "within": -0.1}, InvalidOptionError, "within=-0.1"),
        ({"k": 2, "within": float("nan")}, InvalidOptionError, "within=nan"),
        ({"k": 2, "distance": 0}, InvalidOptionError, "a distance of 1 to 3 groups"),
        ({"k": 2, "distance": 4}, InvalidOptionError, "distance=4"),
        ({"k": 2, "solver": "nobody"}, UnknownSolverError, "nobody"),
        ({"k": 2, "speed": 1}, InvalidOptionError, "no option 'speed'"),
    ],
)
def test_what_makes_no_pool_is_refused(words, error, message):
    with pytest.raises(error, match=message):
        pool(layered_problem(3), **words)
    with pytest.raises(InfeasibleBudgetError):
        pool(layered_problem(3).with_budgets(bytes=1), 2)
