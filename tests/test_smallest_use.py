"""The smallest use with an objective of at most so much: brute force finds the same, and nothing false is proven."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from formulations import InfeasibleBudgetError, PairTerms, Problem
from solvers.base import Search, Solver
from solvers.errors import InvalidOptionError, NoChoiceError
from solvers.exact.brute_force import BruteForce
from solvers.kernels.repair import repair
from solvers.smallest_use import SmallestUse, smallest_use
from solvers.solution import StopReason


def random_problem(
    seed: int, *, pairs: bool, whole: bool = True, macs: bool = False, together: bool = False
) -> Problem:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, size=rng.integers(1, 5))
    count = int(sizes.sum())
    use = rng.integers(0, 30, size=count).astype(float)
    resources = {"bytes": use if whole else use + rng.random(count), "macs": rng.integers(1, 9, size=count)}
    factor = rng.normal(size=(count, 3)) if pairs else None
    return Problem(
        [f"g{i}" for i in range(len(sizes))],
        [[f"o{i}" for i in range(size)] for size in sizes],
        rng.normal(size=count) + 1.0,
        resources,
        {"macs": float(resources["macs"].max() * len(sizes) * 0.7)} if macs else {},
        PairTerms(factor=factor) if pairs else None,
        offset=rng.normal(),
        fixed={"bytes": float(rng.integers(0, 9))},
        resource_pairs={"bytes": used_together(rng, sizes)} if together and len(sizes) > 1 else {},
    )


def used_together(rng: np.random.Generator, sizes: np.ndarray) -> scipy.sparse.csr_array:
    """What options of different groups use together, of half of all pairs."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    terms = rng.integers(0, 9, size=(len(group), len(group))) * (rng.random((len(group), len(group))) < 0.5)
    return scipy.sparse.csr_array(np.where(group[:, None] < group[None, :], terms, 0).astype(float))


def by_brute_force(problem: Problem, at_most: float) -> float | None:
    choices = itertools.product(*(range(len(options)) for options in problem.options))
    judged = [problem.evaluate(choice) for choice in choices]
    uses = [one.usage["bytes"] for one in judged if one.feasible and one.objective <= at_most]
    return min(uses, default=None)


@given(seed=st.integers(0, 10**6), pairs=st.booleans(), whole=st.booleans(), macs=st.booleans(), together=st.booleans(),
       at_most=st.floats(-2, 8), solver=st.sampled_from(["brute-force", "greedy", "anneal"]))  # fmt: skip
def test_exact_solvers_find_the_smallest_use_and_none_proves_what_is_false(
    seed: int, pairs: bool, whole: bool, macs: bool, together: bool, at_most: float, solver: str
) -> None:
    problem = random_problem(seed, pairs=pairs, whole=whole, macs=macs, together=together)
    smallest = by_brute_force(problem, at_most)
    limit_s = None if solver == "brute-force" else 0.3  # what is proven within a time depends on the machine
    try:
        found = smallest_use(problem, "bytes", at_most, solver=solver, seed=0, time_limit=limit_s)
    except InfeasibleBudgetError:
        assert smallest is None
        return
    except NoChoiceError:
        assert solver != "brute-force"
        return
    assert smallest is not None
    judged = problem.evaluate(found.choice)
    assert judged.feasible
    assert judged.objective <= at_most * (1 + 1e-12) + 1e-12
    assert found.at_least <= smallest * (1 + 1e-9)
    assert smallest <= found.usage == judged.usage["bytes"]
    if solver == "brute-force":
        assert found.usage == pytest.approx(smallest, rel=1e-12 if whole or not (pairs or together) else 1e-6)
        assert found.at_least == pytest.approx(smallest, rel=1e-5, abs=1e-5)


def test_the_limit_is_met_exactly_at_its_edge() -> None:
    problem = Problem(["a", "b"], [["keep", "small"]] * 2, [0, 0.25, 0, 0.5], {"bytes": [8, 4, 8, 2]}, {})
    assert [smallest_use(problem, "bytes", limit).usage for limit in (0, 0.25, 0.49, 0.5, 0.75)] == [16, 12, 12, 10, 6]


def test_a_limit_that_nothing_meets_says_how_far_the_objective_came() -> None:
    for pairs in (False, True):
        problem = random_problem(3, pairs=pairs)
        with pytest.raises(InfeasibleBudgetError, match="at most -100; the smallest found is"):
            smallest_use(problem, "bytes", -100.0, solver="brute-force")


@given(
    seed=st.integers(0, 10**6), offset=st.sampled_from([0.0, 100.0, 1e4, 1e6, -1e9]), tenths=st.booleans(),
    solver=st.sampled_from(["brute-force", "auto", "milp"]),
)  # fmt: skip
def test_limits_that_a_choice_meets_exactly_are_met_by_it(seed: int, offset: float, tenths: bool, solver: str) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 9, 12) * 0.1 if tenths else rng.random(12)
    use = rng.integers(1, 50, 12).astype(float)
    problem = Problem(list("abcd"), [["x", "y", "z"]] * 4, cost, {"bytes": use}, {}, None, offset)
    limit = problem.evaluate(rng.integers(0, 3, 4)).objective
    found = smallest_use(problem, "bytes", limit, solver=solver, seed=0, time_limit=5)
    assert found.at_least <= by_brute_force(problem, limit)
    assert found.usage <= by_brute_force(problem, limit)


def test_the_rounding_of_a_large_cost_leaves_no_choice_out() -> None:
    problem = Problem(["a"], [["x", "y", "z"]], [0.3, 0.1, 0.7], {"bytes": [4, 5, 3]}, {}, None, 1e4)
    found = smallest_use(problem, "bytes", problem.evaluate([0]).objective)
    assert (found.usage, found.at_least) == (4, 4)
    problem = Problem(["a"], [["x", "y"]], [0.3, 0.4], {"bytes": [4, 3]}, {}, None, 1e3)
    assert smallest_use(problem, "bytes", problem.evaluate([0]).objective).usage == 4


@dataclass(frozen=True)
class JustAbove(Solver):
    """Proves a choice optimal to 1e-9, though another one is better by less."""

    name: ClassVar[str] = "just-above"
    summary: ClassVar[str] = "a choice that is optimal to 1e-9"
    presolved: ClassVar[bool] = False

    def run(self, problem: Problem, search: Search) -> None:
        for choice in ([1, 1], [0, 1], [0, 0]):
            if search.choice is None:
                search.offer(choice)
        search.close()


def test_a_bound_that_is_true_to_1e_9_proves_nothing_about_limits_that_are_nearer() -> None:
    together = scipy.sparse.csr_array(([5.0, 2 + 2e-10, 2.0, 2.0], ([0, 0, 1, 1], [2, 3, 2, 3])), shape=(4, 4))
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0] * 4, {"bytes": [1, 2, 1, 2]}, {}, PairTerms(sparse=together))
    found = smallest_use(problem, "bytes", 2.0, solver=JustAbove())
    assert (found.usage, found.at_least) == (4, 3)
    assert smallest_use(problem, "bytes", 2.0).usage == 3


def test_a_resource_may_be_called_objective() -> None:
    problem = Problem(["a"], [["x", "y"]], [0, 1], {"bytes": [2, 1], "objective": [1, 2]}, {"objective": 1})
    assert smallest_use(problem, "bytes", 5.0).usage == 2
    assert smallest_use(problem, "objective", 5.0).usage == 1


def test_unknown_resources_and_limits_that_are_no_number_are_refused() -> None:
    with pytest.raises(InvalidOptionError, match="'watts'; there are: bytes, macs"):
        smallest_use(random_problem(0, pairs=False), "watts", 1.0)
    with pytest.raises(InvalidOptionError, match="finite number"):
        smallest_use(random_problem(0, pairs=False), "bytes", float("nan"))


def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    found = smallest_use(random_problem(1, pairs=True), "bytes", 6.0, solver="brute-force")
    found.save(tmp_path / "use.json")
    assert SmallestUse.load(tmp_path / "use.json").to_json() == found.to_json()


def paired_problem(scale: float) -> Problem:
    rng = np.random.default_rng(0)
    cost, use = rng.random(12) * 10, rng.integers(1, 50, 12) * scale
    pairs = PairTerms(factor=rng.normal(size=(12, 2)) * 0.1)
    return Problem(list("abcd"), [["x", "y", "z"]] * 4, cost, {"bytes": use}, {}, pairs)


@pytest.mark.parametrize("scale", [1e11, 4e12])
def test_uses_whose_tolerance_is_above_one_unit_are_proven_to_the_unit(scale: float) -> None:
    problem = paired_problem(scale)
    found = smallest_use(problem, "bytes", 15.0, solver="brute-force")
    assert found.usage == found.at_least == by_brute_force(problem, 15.0)
    within = problem.with_budgets(bytes=found.usage / (1 + 0.9e-12))  # met only within the tolerance
    assert smallest_use(within, "bytes", 15.0, solver="brute-force").usage == found.usage


@dataclass(frozen=True)
class Slow(Solver):
    """Finds a good choice only with enough time, and is never done."""

    name: ClassVar[str] = "slow"
    summary: ClassVar[str] = "a good choice with enough time"
    presolved: ClassVar[bool] = False
    runs: ClassVar[list[tuple[float | None, object]]] = []

    enough_s: float = 5.0

    def run(self, problem: Problem, search: Search) -> None:
        self.runs.append((search.limit, None if search.initial is None else search.initial.tolist()))
        search.offer([0] * problem.num_groups)
        if search.limit is not None and search.limit >= self.enough_s:
            BruteForce().run(problem, search)
        search.cut_short()


def least_objective(problem: Problem) -> float:
    choices = itertools.product(*(range(len(options)) for options in problem.options))
    return min(problem.evaluate(choice).objective for choice in choices)


def test_a_first_choice_within_the_limit_may_take_all_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "runs", [])
    problem = random_problem(0, pairs=True)
    limit = least_objective(problem)
    found = smallest_use(problem, "bytes", limit, solver=Slow(enough_s=40.0), time_limit=100)
    assert found.usage == by_brute_force(problem, limit)
    assert [start for _, start in Slow.runs[:3]] == [None, [0] * 4, [0] * 4]


def test_that_no_choice_exists_is_said_only_if_it_is_proven() -> None:
    problem = random_problem(0, pairs=True)
    limit = least_objective(problem)
    early = "before the time ended, which does not prove.*; the smallest found is .*; allow more time, raise"
    with pytest.raises(NoChoiceError, match=early):
        smallest_use(problem, "bytes", limit, solver=Slow(enough_s=500.0), time_limit=100)
    with pytest.raises(NoChoiceError, match="was found, which does not prove.*; raise the limit"):
        smallest_use(problem, "bytes", limit, solver=Slow())
    with pytest.raises(InfeasibleBudgetError, match="no choice within the budgets has"):
        smallest_use(problem, "bytes", limit - 1e-3, solver="brute-force")
    alone = random_problem(0, pairs=False, macs=True).with_budgets(macs=1e6)
    with pytest.raises(InfeasibleBudgetError, match="no choice within the budgets has"):
        smallest_use(alone, "bytes", least_objective(alone) - 1e-3, solver="greedy")


@dataclass(frozen=True)
class Idle(Solver):
    """Finds nothing good, and is done at once."""

    name: ClassVar[str] = "idle"
    summary: ClassVar[str] = "the first options, at once"
    presolved: ClassVar[bool] = False

    def run(self, problem: Problem, search: Search) -> None:
        search.offer([0] * problem.num_groups)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("time_limit", [None, 100.0])
def test_a_solver_that_ends_by_itself_is_given_no_advice_to_allow_more_time(
    pairs: bool, time_limit: float | None
) -> None:
    problem = random_problem(0, pairs=pairs)
    with pytest.raises(NoChoiceError, match="was found, which does not prove.*; raise the limit or take another"):
        smallest_use(problem, "bytes", least_objective(problem), solver=Idle(), time_limit=time_limit)


@pytest.mark.parametrize("pairs", [False, True])
def test_compiling_is_no_part_of_the_time(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr("solvers.smallest_use.time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    monkeypatch.setattr(Slow, "prepare", lambda _: vars(clock).update(now_s=clock.now_s + 30.0))
    monkeypatch.setattr(Slow, "runs", [])
    smallest_use(random_problem(0, pairs=pairs), "bytes", 1e6, solver=Slow(), time_limit=20)
    assert Slow.runs[0][0] == (1.0 if pairs else 18.0)


@dataclass(frozen=True)
class Pressed(Solver):
    """Brute force, but Ctrl-C is pressed in a run after its first choice."""

    name: ClassVar[str] = "pressed"
    summary: ClassVar[str] = "brute force until Ctrl-C"
    presolved: ClassVar[bool] = False
    runs: ClassVar[list[int]] = []

    at: int = 1
    first: bool = True

    def run(self, problem: Problem, search: Search) -> None:
        self.runs.append(1)
        if self.first:
            search.offer(repair(problem, np.zeros(problem.num_groups, dtype=np.int64)))
        if len(self.runs) == self.at:
            raise KeyboardInterrupt
        BruteForce().run(problem, search)


@pytest.mark.parametrize("pairs", [True, False])
def test_ctrl_c_ends_all_of_it_with_the_choice_so_far(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = paired_problem(1.0) if pairs else random_problem(12, pairs=False)
    limit = 15.0 if pairs else problem.evaluate([0] * problem.num_groups).objective + 1.0
    for at in (2, 3, 4) if pairs else (1,):
        monkeypatch.setattr(Pressed, "runs", [])
        found = smallest_use(problem, "bytes", limit, solver=Pressed(at=at))
        assert (found.stop_reason, len(Pressed.runs)) == (StopReason.INTERRUPTED, at)
        assert problem.evaluate(found.choice).objective <= limit
        assert found.at_least <= by_brute_force(problem, limit)
    monkeypatch.setattr(Pressed, "runs", [])
    with pytest.raises(KeyboardInterrupt):
        smallest_use(problem, "bytes", limit, solver=Pressed(first=False))
