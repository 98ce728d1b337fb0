"""`Problem`, `PairTerms`, `Evaluation`: what is accepted, what is refused and why; the judge judges right."""

import itertools
import pickle
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import InfeasibleBudgetError, InvalidProblemError, PairTerms, Problem
from formulations.generators.random_instances import channel_problem, layered_problem, small_problem
from formulations.reductions.scaling import scaled

SEEDS = st.integers(0, 10**6)


def two_groups(**changes):
    """Two groups of two and three options; ``changes`` replace arguments of `Problem`."""
    arguments = {
        "groups": ["a", "b"],
        "options": [["keep", "4 bit"], ["keep", "8 bit", "4 bit"]],
        "cost": [0.0, 3.0, 0.0, 1.0, 4.0],
        "resources": {"bytes": [8.0, 4.0, 16.0, 8.0, 4.0]},
        "budgets": {"bytes": 16.0},
    }
    return Problem(**{**arguments, **changes})


def upper(entries, size=5):
    rows, columns, values = zip(*entries, strict=True)
    return scipy.sparse.csr_array((values, (rows, columns)), shape=(size, size))


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [], "options": []}, "at least one group, found none"),
        ({"groups": ["a"]}, "1 groups, 2 sequences"),
        ({"groups": ["a", "a"]}, "group names must differ, found 'a' twice"),
        ({"groups": "ab"}, "groups must be a sequence of names, found the string 'ab'"),
        (
            {"options": [["keep"], "4 bit"]},
            "options of group 'b' must be a sequence of names, found the string '4 bit'",
        ),
        ({"options": [["keep"], []]}, "group 'b' has no option"),
        ({"options": [["x", "x"], ["keep", "8 bit", "4 bit"]]}, "'x' twice in 'a'"),
        ({"cost": [0.0, 1.0]}, r"cost must have shape \(5,\).*found \(2,\)"),
        ({"cost": np.zeros((5, 1))}, r"found \(5, 1\)"),
        ({"cost": [0, 0, np.nan, 0, 0]}, "cost must be finite, found nan at flat option 2"),
        ({"cost": [0, 0, 0, 0, -np.inf]}, "cost must be finite, found -inf"),
        ({"cost": ["dear"] * 5}, "cost must be numbers"),
        ({"cost": [[0], [1, 2], 0, 0, 0]}, "cost must be numbers"),
        ({"resources": {"bytes": [1.0]}}, "resource 'bytes' must have shape"),
        ({"resources": {"bytes": [1, 1, 1, np.inf, 1]}}, "resource 'bytes' must be finite"),
        ({"resources": {"bytes": [8, 4, 16, -8, 4]}}, "found -8 for option '8 bit' of group 'b'"),
        ({"budgets": {"macs": 3}}, "budget 'macs' names no resource of the problem; it has: bytes"),
        ({"budgets": {"bytes": np.nan}}, "budget 'bytes' must be a finite number, found nan"),
        ({"budgets": {"bytes": "plenty"}}, "budget 'bytes' must be a finite number, found 'plenty'"),
        ({"budgets": {"bytes": None}}, "budget 'bytes' must be a finite number, found None"),
        ({"fixed": {"macs": 3}}, "fixed use 'macs' names no resource of the problem; it has: bytes"),
        ({"fixed": {"bytes": -1.0}}, "fixed use of 'bytes' must not be negative, found -1"),
        ({"fixed": {"bytes": np.inf}}, "fixed use of 'bytes' must be a finite number, found inf"),
        ({"offset": np.inf}, "offset must be a finite number, found inf"),
        ({"pairs": np.zeros((5, 5))}, "pairs must be a PairTerms, found ndarray"),
        ({"pairs": PairTerms(factor=np.ones((4, 1)))}, "pair terms are for 4 options, the problem has 5"),
        ({"pairs": PairTerms(sparse=upper([(0, 1, 1.0)]))}, r"one group \(flat options 0 and 1\)"),
    ],
)
def test_a_problem_refuses_what_does_not_fit(changes, message):
    with pytest.raises(InvalidProblemError, match=message):
        two_groups(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparse": np.zeros((2, 2))}, "must be a scipy.sparse matrix, found ndarray"),
        ({"sparse": scipy.sparse.csr_array((2, 3))}, r"shape \(V, V\), found \(2, 3\)"),
        ({"sparse": upper([(1, 0, 1.0)])}, "strictly upper triangular"),
        ({"sparse": upper([(1, 1, 1.0)])}, "strictly upper triangular"),
        ({"sparse": upper([(0, 1, np.nan)])}, "finite"),
        ({"factor": np.ones(3)}, r"shape \(V, r\), found \(3,\)"),
        ({"factor": [[np.inf]]}, "finite"),
        ({"factor": [["a"]]}, "must be numbers"),
        ({"sparse": upper([(0, 2, 1.0)]), "factor": np.ones((4, 1))}, "sparse has 5, factor has 4"),
    ],
)
def test_pair_terms_refuse_what_does_not_fit(arguments, message):
    with pytest.raises(InvalidProblemError, match=message):
        PairTerms(**arguments)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ([0], r"expected 2, found shape \(1,\)"),
        ([[0, 0]], r"one choice of shape \(2,\)"),
        ([0, 3], "group 'b' has options 0..2, the choice asks for 3"),
        ([-1, 0], "group 'a' has options 0..1, the choice asks for -1"),
        ([0.5, 0], "whole numbers"),
        ([np.nan, 0], "whole numbers"),
        (["keep", "keep"], "whole numbers"),
    ],
)
def test_evaluate_refuses_a_choice_that_is_none(choice, message):
    with pytest.raises(InvalidProblemError, match=message):
        two_groups().evaluate(choice)


# --- what holds once it stands -------------------------------------------------------------------------------------


def test_nothing_in_a_problem_can_be_changed():
    cost, factor = np.zeros(5), np.ones((5, 1))
    problem = two_groups(cost=cost, pairs=PairTerms(sparse=upper([(0, 2, 1.0)]), factor=factor))
    for array in (problem.cost, problem.resources["bytes"], problem.group_of, problem.pairs.factor):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7
    with pytest.raises(ValueError, match="read-only"):
        problem.pairs.sparse.data[0] = 7
    with pytest.raises(TypeError):
        problem.budgets["bytes"] = 1.0
    with pytest.raises(AttributeError):
        problem.offset = 1.0
    cost[0] = factor[0] = 9.0  # the caller's arrays are the caller's
    assert problem.cost[0] == 0.0
    assert problem.pairs.factor[0, 0] == 1.0


def test_shapes_of_the_flat_numbering():
    problem = two_groups()
    assert (problem.num_groups, problem.num_options) == (2, 5)
    assert problem.group_offsets.tolist() == [0, 2, 5]
    assert problem.group_of.tolist() == [0, 0, 1, 1, 1]
    assert problem.flat([[0, 0], [1, 2]]).tolist() == [[0, 2], [1, 4]]


def naive_evaluation(problem, choice):
    """The definition, term by term."""
    chosen = [int(problem.group_offsets[g]) + o for g, o in enumerate(choice)]
    objective = problem.offset
    for i, v in enumerate(chosen):
        objective += problem.cost[v]
        for u in chosen[:i]:
            if problem.pairs.sparse is not None:
                objective += problem.pairs.sparse[u, v]
            if problem.pairs.factor is not None:
                objective += sum(a * b for a, b in zip(problem.pairs.factor[u], problem.pairs.factor[v], strict=True))
    fixed = {name: problem.fixed.get(name, 0.0) for name in problem.resources}
    return objective, {name: fixed[name] + sum(use[v] for v in chosen) for name, use in problem.resources.items()}


@given(SEEDS, SEEDS)
@settings(max_examples=200, deadline=None)
def test_evaluate_equals_the_definition(seed, choice_seed):
    problem = small_problem(seed)
    sizes = np.diff(problem.group_offsets)
    choice = np.random.default_rng(choice_seed).integers(0, sizes)
    objective, usage = naive_evaluation(problem, choice)
    judged = problem.evaluate(choice)
    assert judged.objective == pytest.approx(objective, rel=1e-12, abs=1e-12)
    assert judged.usage == pytest.approx(usage)
    over = {name: usage[name] - budget for name, budget in problem.budgets.items() if usage[name] > budget * (1 + 1e-9)}
    assert judged.violations == pytest.approx(over)
    assert judged.feasible == (not over)


def test_a_choice_may_come_as_a_list_or_any_whole_numbers():
    problem = two_groups()
    assert problem.evaluate([1, 2]) == problem.evaluate(np.array([1.0, 2.0])) == problem.evaluate(np.uint8([1, 2]))


def test_a_use_that_meets_the_budget_up_to_the_rounding_of_its_sum_is_within_it():
    uses = {"joules": np.full(10, 0.1)}
    problem = Problem([f"g{i}" for i in range(10)], [["only"]] * 10, np.zeros(10), uses, {"joules": 1.0})
    assert problem.evaluate(np.zeros(10, int)).feasible
    assert not problem.with_budgets(joules=1.0 - 1e-9).evaluate(np.zeros(10, int)).feasible


def test_factor_products_inside_a_group_do_not_count():
    problem = Problem(["a"], [["x", "y"]], [1.0, 2.0], {}, {}, PairTerms(factor=[[3.0], [4.0]]))
    assert problem.evaluate([1]).objective == 2.0


def test_pair_terms_of_a_matrix_in_any_sparse_format_are_the_same():
    entries = [(0, 2, 1.5), (1, 4, -2.0)]
    for form in (scipy.sparse.coo_array, scipy.sparse.csc_array, scipy.sparse.csr_matrix, scipy.sparse.lil_array):
        problem = two_groups(pairs=PairTerms(sparse=form(upper(entries))))
        assert problem.evaluate([1, 2]).objective == 3.0 + 4.0 - 2.0


def test_only_a_factor_that_nobody_can_change_is_taken_without_a_copy():
    given = np.ones((4, 2))
    view = given[:]
    view.flags.writeable = False
    assert not np.shares_memory(PairTerms(factor=given).factor, given)
    assert not np.shares_memory(PairTerms(factor=view).factor, given)
    given.flags.writeable = False
    assert PairTerms(factor=given).factor is given


def test_pair_terms_are_true_only_when_there_are_any():
    assert not PairTerms()
    assert not PairTerms(sparse=scipy.sparse.csr_array((3, 3)), factor=np.zeros((3, 0)))
    assert PairTerms(factor=np.ones((3, 1)))
    assert PairTerms(sparse=upper([(0, 2, 1.0)]))


# --- budgets -------------------------------------------------------------------------------------------------------


def test_with_budgets_sets_some_anew_and_keeps_the_rest():
    problem = two_groups(resources={"bytes": [8, 4, 16, 8, 4], "macs": [1, 1, 2, 2, 2]})
    changed = problem.with_budgets(macs=5).with_budgets(bytes=9.0)
    assert dict(changed.budgets) == {"bytes": 9.0, "macs": 5.0}
    assert dict(problem.budgets) == {"bytes": 16.0}
    assert changed.cost is problem.cost
    with pytest.raises(InvalidProblemError, match="names no resource of the problem; it has: bytes, macs"):
        problem.with_budgets(watts=1)
    with pytest.raises(InvalidProblemError, match="finite"):
        problem.with_budgets(bytes=float("inf"))


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_a_budget_holds_with_fixed_use_exactly_where_what_it_leaves_holds_without(seed):
    """The budgets are drawn so that some are met exactly; both problems must draw the line at the same choices."""
    problem = small_problem(seed)
    alone = problem.without_fixed()
    assert not alone.fixed
    for choice in itertools.product(*(range(len(options)) for options in problem.options)):
        whole, part = problem.evaluate(choice), alone.evaluate(choice)
        assert (part.objective, set(part.violations)) == (whole.objective, set(whole.violations))
        rest = {name: use - part.usage[name] for name, use in whole.usage.items()}
        assert rest == pytest.approx({name: problem.fixed.get(name, 0.0) for name in rest}, abs=1e-9)


def test_fixed_use_counts_in_usage_budgets_and_the_smallest_use():
    problem = two_groups(fixed={"bytes": 5.0})
    assert problem.evaluate([1, 2]).usage == {"bytes": 13.0}
    assert problem.evaluate([0, 1]).violations == {"bytes": 5.0}
    assert problem.minimum_usage() == {"bytes": 13.0}
    with pytest.raises(InfeasibleBudgetError, match="asked for at most 12, the smallest possible use is 13"):
        problem.with_budgets(bytes=12).require_reachable_budgets()
    assert two_groups(fixed={"bytes": 0.0}).fingerprint() == two_groups().fingerprint() != problem.fingerprint()
    assert pickle.loads(pickle.dumps(problem)).fingerprint() == problem.fingerprint()


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_minimum_usage_is_the_least_use_of_each_resource_by_itself(seed):
    problem = small_problem(seed)
    offsets = problem.group_offsets
    for name, least in problem.minimum_usage().items():
        use = problem.resources[name]
        fixed = problem.fixed.get(name, 0.0)
        assert least == pytest.approx(fixed + sum(use[a:b].min() for a, b in itertools.pairwise(offsets)))
    problem.require_reachable_budgets()  # its budgets are drawn reachable


def test_an_unreachable_budget_is_refused_with_resource_asked_and_smallest():
    problem = two_groups(
        resources={"bytes": [8, 4, 16, 8, 4], "macs": [5, 5, 7, 7, 7]}, budgets={"bytes": 7, "macs": 9}
    )
    with pytest.raises(InfeasibleBudgetError) as refused:
        problem.require_reachable_budgets()
    assert str(refused.value) == (
        "no choice meets the budget for bytes: asked for at most 7, the smallest possible use is 8; "
        "macs: asked for at most 9, the smallest possible use is 12"
    )
    problem.with_budgets(bytes=8, macs=12).require_reachable_budgets()


# --- copies --------------------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([1e-12, 0.25, 3.0, 1e9]))
@settings(max_examples=50, deadline=None)
def test_scaled_multiplies_every_objective_and_touches_nothing_else(seed, factor):
    problem = small_problem(seed)
    other = scaled(problem, factor).problem
    choice = np.zeros(problem.num_groups, int)
    before, after = problem.evaluate(choice), other.evaluate(choice)
    size = np.abs(problem.cost).sum() + abs(problem.offset)
    assert after.objective == pytest.approx(before.objective * factor, rel=1e-9, abs=1e-9 * factor * size)
    assert after.usage == before.usage
    assert other.budgets == problem.budgets


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf"), 1e308])
def test_scaled_refuses_a_factor_that_leaves_no_problem(factor):
    with pytest.raises(InvalidProblemError):
        scaled(two_groups(cost=[1e9] * 5), factor)


@given(SEEDS)
@settings(max_examples=50, deadline=None)
def test_a_pickled_problem_is_the_same_problem(seed):
    problem = small_problem(seed)
    assert pickle.loads(pickle.dumps(problem)).fingerprint() == problem.fingerprint()


def test_the_fingerprint_tells_problems_apart():
    variants = [
        two_groups(),
        two_groups(offset=1.0),
        two_groups(cost=[0.0, 3.0, 0.0, 1.0, 4.5]),
        two_groups(groups=["a", "c"]),
        two_groups(budgets={}),
        two_groups(resources={"bytes": [8.0, 4.0, 16.0, 8.0, 5.0]}),
        two_groups(pairs=PairTerms(factor=np.ones((5, 1)))),
        two_groups(pairs=PairTerms(sparse=upper([(0, 2, 1.0)]))),
    ]
    assert len({problem.fingerprint() for problem in variants}) == len(variants)
    assert two_groups().fingerprint() == two_groups().fingerprint()


@pytest.mark.parametrize("arguments", [{}, {"rank": 0}, {"degree": 2}, {"bits": (4, 8), "budget": 0.0}])
def test_layered_problems_can_be_solved_and_are_the_same_for_a_seed(arguments):
    problem = layered_problem(12, seed=3, **arguments)
    problem.require_reachable_budgets()
    assert problem.fingerprint() == layered_problem(12, seed=3, **arguments).fingerprint()
    assert problem.fingerprint() != layered_problem(12, seed=4, **arguments).fingerprint()


def test_channel_problems_prune_what_is_over_the_budget():
    problem = channel_problem(70, per_layer=20, rank=3, keep=0.5, seed=1)
    kept, pruned = problem.evaluate(np.zeros(70, int)), problem.evaluate(np.ones(70, int))
    assert kept.objective == 0.0
    assert kept.usage["bytes"] == pytest.approx(2 * problem.budgets["bytes"], abs=2)
    assert pruned.usage["bytes"] == 0.0
    assert problem.fingerprint() == channel_problem(70, per_layer=20, rank=3, seed=1).fingerprint()


@given(seed=st.integers(0, 10**6), groups=st.sampled_from([2, 3, 8, 333]), length=st.sampled_from([1.0, 1e8, 1e150]))
def test_short_rows_of_a_factor_count_beside_a_long_one(seed: int, groups: int, length: float) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(-8, 9, (groups, 16)) / 8
    rows[:, 0] = 0.0
    rows[rng.integers(groups), 0] = length  # a column of its own, so that it has no pair terms
    problem = Problem(
        [f"g{i}" for i in range(groups)], [["x"]] * groups, [0.0] * groups, {}, {}, PairTerms(factor=rows)
    )
    total = [sum(map(Fraction, column)) for column in rows.T[1:].tolist()]
    squares = sum(Fraction(number) ** 2 for number in rows[:, 1:].ravel().tolist())
    exact = float((sum(number**2 for number in total) - squares) / 2)
    assert problem.evaluate([0] * groups).objective == pytest.approx(exact, rel=1e-12, abs=1e-12)
