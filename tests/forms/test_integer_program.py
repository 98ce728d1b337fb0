"""The integer program has the problem's optimum, and a part of a problem has the problem's objective."""

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import EncodingError, InvalidProblemError
from formulations.forms.integer_program import MAX_PRODUCTS, num_products, to_integer_program
from formulations.generators.random_instances import layered_problem, small_problem
from formulations.reductions.restriction import restrict
from solvers import solve


def highs():
    return pulp.HiGHS(msg=False, gapRel=0.0, gapAbs=0.0)


@pytest.mark.parametrize("chunk", range(4))
def test_its_optimum_is_the_problem_s(chunk):
    for seed in range(40 * chunk, 40 * (chunk + 1)):
        problem = small_problem(seed)
        oracle = solve(problem, "brute-force")
        model, decode = to_integer_program(problem)
        model.solve(highs())
        if oracle.choice is None:
            assert model.status == pulp.LpStatusInfeasible, seed
        else:
            assert pulp.value(model.objective) == pytest.approx(oracle.objective, abs=1e-6), seed
            assert problem.evaluate(decode()).objective == pytest.approx(oracle.objective, abs=1e-6), seed


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_every_choice_has_the_problem_s_objective_in_the_model(seed, random):
    problem = small_problem(seed)
    program = to_integer_program(problem)
    choice = [random.randrange(len(options)) for options in problem.options]
    program.start_from(choice)
    assert pulp.value(program.model.objective) == pytest.approx(problem.evaluate(choice).objective, abs=1e-9)
    assert program.decode().tolist() == choice
    broken = [row for row in program.model.constraints() if not row.valid(1e-7)]
    budgets = problem.evaluate(choice).violations
    assert all(row.name.startswith("budget_") for row in broken)
    assert bool(broken) <= bool(budgets)


def test_decode_reads_a_sample_by_name():
    problem = small_problem(7)
    program = to_integer_program(problem)
    choice = [len(options) - 1 for options in problem.options]
    sample = {x.name: 0.0 for x in program.x}
    sample |= {f"x_{group}_{option}": 0.9 for group, option in enumerate(choice)}
    assert program.decode(sample).tolist() == choice


def test_decode_before_solving_is_refused():
    with pytest.raises(EncodingError, match="was the model solved"):
        to_integer_program(small_problem(1)).decode()


def test_relaxation_of_a_full_block_is_its_convex_hull():
    """Two groups and any weights: the linear program alone is already integral."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        problem = layered_problem(2, rank=3, seed=seed, budget=1.0)
        problem = problem.derived(cost=rng.normal(size=problem.num_options))
        model = to_integer_program(problem).model
        model.solve(pulp.HiGHS(msg=False, mip=False))
        assert pulp.value(model.objective) == pytest.approx(solve(problem, "brute-force").objective, abs=1e-7)


def test_products_are_counted_before_they_are_built():
    problem = layered_problem(12, degree=3)
    assert num_products(problem) == len(to_integer_program(problem).y)
    with pytest.raises(EncodingError, match=f"the limit is {MAX_PRODUCTS:,}"):
        to_integer_program(layered_problem(200))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_a_part_of_a_problem_judges_choices_like_the_whole(seed, random):
    problem = small_problem(seed)
    keep = np.array([random.random() < 0.6 for _ in range(problem.num_options)])
    keep[problem.group_offsets[:-1]] = True
    part = restrict(problem, keep)
    choice = [random.randrange(len(options)) for options in part.problem.options]
    whole = part.lift(choice)
    assert keep[problem.flat(whole)].all()
    small, large = part.problem.evaluate(choice), problem.evaluate(whole)
    assert small.objective == pytest.approx(large.objective, abs=1e-9)
    assert small.feasible == large.feasible
    assert part.lower(whole).tolist() == choice


def test_a_choice_with_a_left_out_option_is_not_in_the_part():
    problem = layered_problem(3)
    keep = np.ones(problem.num_options, dtype=bool)
    keep[problem.group_offsets[1]] = False
    assert restrict(problem, keep).lower([0, 0, 0]) is None
    assert restrict(problem, keep).lower([0, 1, 0]).tolist() == [0, 0, 0]


def test_a_group_without_options_is_refused():
    problem = layered_problem(2)
    with pytest.raises(InvalidProblemError, match="'layer1' is left without"):
        restrict(problem, problem.group_of == 0)
