"""Beam search: a measured loss, bounded and remembered measurements, feasible answers, the same each time."""

import itertools

import numpy as np
import pytest

from formulations import InfeasibleBudgetError, Problem
from formulations.generators.random_instances import layered_problem, small_problem
from solvers import InvalidOptionError, solve
from solvers.beam import beam_search
from solvers.bounds.duality import dual_bound


def noisy_prediction(true, seed):
    """The same choices and budgets; the objective knows no pair terms and is off by half, option by option."""
    wrong = np.random.default_rng(seed).lognormal(0.0, 0.4, true.num_options)
    return Problem(true.groups, true.options, true.cost * wrong, dict(true.resources), dict(true.budgets))


class Counted:
    """A true loss that counts its calls and can break."""

    def __init__(self, true, breaks_at=None):
        self.true, self.breaks_at, self.asked = true, breaks_at, []

    def __call__(self, choice):
        if len(self.asked) == self.breaks_at:
            raise RuntimeError("out of memory")
        self.asked.append(tuple(choice.tolist()))
        return self.true.evaluate(choice).objective


def best_of_all(problem, measure):
    choices = itertools.product(*(range(len(options)) for options in problem.options))
    return min((measure(np.array(c)) for c in choices if problem.evaluate(c).feasible), default=None)


def test_it_finds_the_optimum_of_most_small_problems_and_only_feasible_choices():
    found = total = 0
    for seed in range(60):
        problem = small_problem(seed)
        best = best_of_all(problem, lambda choice, p=problem: p.evaluate(choice).objective)
        try:
            result = beam_search(problem, lambda choice, p=problem: p.evaluate(choice).objective)
        except InfeasibleBudgetError:
            continue
        if result.choice is None:
            assert best is None or len(problem.budgets) > 1
            continue
        judged = problem.evaluate(result.choice)
        assert judged.feasible
        assert result.loss == judged.objective >= best - 1e-9
        total += 1
        found += result.loss <= best + 1e-9
    assert total > 30
    assert found >= 0.95 * total


def test_measuring_beats_the_prediction_where_that_is_wrong():
    for seed in range(3):
        true = layered_problem(20, seed=seed)
        predicted = noisy_prediction(true, seed)
        measure = Counted(true)
        result = beam_search(predicted, measure, max_measurements=300)
        blind = true.evaluate(solve(predicted, "lagrangian").choice).objective
        best = solve(true, "lagrangian", seed=0).objective
        assert result.loss - best < 0.25 * (blind - best)


def test_measurements_are_bounded_counted_and_never_repeated():
    true = layered_problem(20, seed=1)
    for most in (1, 2, 17, 60):
        measure = Counted(true)
        result = beam_search(noisy_prediction(true, 1), measure, max_measurements=most)
        assert len(measure.asked) == result.measurements <= most
        assert len(set(measure.asked)) == len(measure.asked)
        assert not result.complete
        assert result.choice is not None  # the first measurement is of a choice within the budgets


def test_a_search_that_broke_goes_on_from_its_cache():
    true = layered_problem(12, seed=2)
    predicted, cache = noisy_prediction(true, 2), {}
    whole = beam_search(predicted, Counted(true))
    with pytest.raises(RuntimeError, match="out of memory"):
        beam_search(predicted, Counted(true, breaks_at=40), cache=cache)
    assert len(cache) == 40
    again = beam_search(predicted, Counted(true), cache=cache)
    assert (again.choice.tolist(), again.loss) == (whole.choice.tolist(), whole.loss)
    assert (again.cached, again.measurements) == (40, whole.measurements - 40)


def test_the_same_input_gives_the_same_search():
    true = layered_problem(15, seed=3)
    first, second = Counted(true), Counted(true)
    for measure in (first, second):
        beam_search(noisy_prediction(true, 3), measure, max_measurements=150)
    assert first.asked == second.asked


def test_progress_tells_levels_measurements_and_the_best():
    told = []
    problem = layered_problem(10, seed=1)
    result = beam_search(problem, Counted(problem), levels=5, on_progress=told.append)
    assert tuple(told) == result.steps
    assert [step.level for step in told] == list(range(1, len(told) + 1))
    assert all(a.measurements <= b.measurements and a.best >= b.best for a, b in itertools.pairwise(told))
    assert told[-1].best == result.loss


def test_a_start_is_measured_and_kept_when_nothing_is_better():
    problem = layered_problem(10, seed=1)
    best = solve(problem, "lagrangian", seed=0).choice
    result = beam_search(problem, Counted(problem), start=best, max_measurements=1)
    assert result.choice.tolist() == best.tolist()


def test_not_a_number_is_never_the_answer():
    problem = layered_problem(6, seed=1)
    result = beam_search(problem, lambda choice: np.nan if choice[0] else float(choice.sum()), max_measurements=500)
    assert result.choice[0] == 0
    assert beam_search(problem, lambda choice: np.nan).choice is None


def test_stop_ends_the_search_with_the_best_so_far():
    problem = layered_problem(20, seed=1)
    measure = Counted(problem)
    result = beam_search(problem, measure, stop=lambda: len(measure.asked) >= 25)
    assert len(measure.asked) == 25
    assert problem.evaluate(result.choice).feasible


@pytest.mark.parametrize("option", ["width", "branch", "levels", "max_measurements"])
def test_impossible_options_are_refused(option):
    with pytest.raises(InvalidOptionError, match=option):
        beam_search(layered_problem(3), lambda _: 0.0, **{option: 0})
    if option != "max_measurements":
        with pytest.raises(InvalidOptionError, match=option):
            solve(layered_problem(3), "beam", **{option: 0})


def test_pricing_leaves_most_of_a_short_time_to_the_search(monkeypatch):
    seconds = []

    def recorded(problem, *, time_limit):
        seconds.append(time_limit)
        return dual_bound(problem, time_limit=time_limit)

    monkeypatch.setattr("solvers.beam.dual_bound", recorded)
    solve(layered_problem(30, seed=1), "beam", time_limit=0.5)
    assert 0.0 < max(seconds[-1:]) <= 0.1
    solve(layered_problem(30, seed=1), "beam")
    assert seconds[-1] == 1.0
