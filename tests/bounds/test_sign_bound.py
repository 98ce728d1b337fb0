"""The bound in signs lies below every choice, as do its bounds of single options, from any start."""

import itertools

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import PairTerms, Problem
from formulations.reductions.restriction import restrict
from solvers.bounds.sign_bound import sign_bound
from solvers.bounds.signs import SignForm
from solvers.bounds.triangles import SIGNS, Triangles, slacks, subtract

TOLERANCE = 1e-8  # of sums of some dozen numbers up to 10, with eigenvalues accurate to 1e-13 of them


def bits(size, seed, density=0.8):
    """Random bits with costs and pair terms of both signs, in all four products of two groups."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(size), 2)
    terms = rng.integers(-9, 10, (2 * size, 2 * size)) * (rng.random((2 * size, 2 * size)) < density)
    terms = np.triu(terms, 1) * (groups[:, None] != groups[None, :])
    pairs = PairTerms(sparse=scipy.sparse.csr_array(terms.astype(float)))
    names = [f"x{i}" for i in range(size)]
    return Problem(names, [["0", "1"]] * size, rng.normal(size=2 * size), {}, {}, pairs, offset=rng.normal())


def every_choice(problem):
    """All choices with their objectives."""
    choices = np.array(list(itertools.product((0, 1), repeat=problem.num_groups)))
    return choices, np.array([problem.evaluate(choice).objective for choice in choices])


@given(st.integers(1, 7), st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_form_in_signs_is_the_objective(size, seed):
    problem = bits(size, seed)
    form = SignForm.of(problem)
    for choice, objective in zip(*every_choice(problem), strict=True):
        signs = np.concatenate([[1], 2 * choice - 1])
        assert form.constant + signs @ form.matrix @ signs == pytest.approx(objective, abs=TOLERANCE)


@given(st.integers(2, 8), st.integers(0, 10_000), st.floats(-40, 10))
@settings(max_examples=25, deadline=None)
def test_no_choice_lies_below_the_bounds_of_its_options(size, seed, target):
    problem = bits(size, seed)
    choices, objectives = every_choice(problem)
    for bound in (sign_bound(problem), sign_bound(problem, target=target), sign_bound(problem, time_limit=0.0)):
        assert bound.value <= objectives.min() + TOLERANCE
        for choice, objective in zip(choices, objectives, strict=True):
            assert bound.at_least[problem.flat(choice)].max() <= objective + TOLERANCE
        assert np.add.reduceat(bound.share, problem.group_offsets[:-1]) == pytest.approx(1.0)


@given(st.integers(0, 10_000), st.data())
@settings(max_examples=15, deadline=None)
def test_a_bound_that_starts_from_another_problems_state_is_valid(seed, data):
    problem = bits(9, seed)
    state = sign_bound(problem).state
    decided = data.draw(st.dictionaries(st.integers(0, 8), st.integers(0, 1), min_size=1, max_size=6))
    keep = np.ones(problem.num_options, dtype=bool)
    signs = np.zeros(9, dtype=np.int64)
    for group, option in decided.items():
        keep[2 * group + 1 - option] = False
        signs[group] = 2 * option - 1
    part = restrict(problem, keep).problem
    rest = np.array([group for group in range(9) if group not in decided])
    assert sign_bound(part, start=state.restricted(rest, signs)).value <= every_choice(part)[1].min() + TOLERANCE


def test_triangles_close_the_gap_of_an_odd_cycle():
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)]
    terms = np.zeros((10, 10))
    linear = np.zeros(10)
    for i, j in edges:
        terms[2 * i + 1, 2 * j + 1] = 2.0
        linear[[2 * i + 1, 2 * j + 1]] -= 1.0
    problem = Problem(list("abcde"), [["0", "1"]] * 5, linear, {}, {}, PairTerms(sparse=scipy.sparse.csr_array(terms)))
    # without triangles the bound is -5·(1 + cos(π/5))/2 = -4.52 (Goemans & Williamson)
    assert sign_bound(problem).value == pytest.approx(-4.0, abs=0.02)


@given(st.integers(0, 10_000), st.integers(4, 8))
@settings(max_examples=20, deadline=None)
def test_merged_triangles_say_the_same_about_the_remaining_signs(seed, size):
    rng = np.random.default_rng(seed)
    triangles = Triangles.none().with_violated(rng.uniform(-1, 1, (size, size)), 30, -9.0)
    place, sign = np.zeros(size, dtype=np.int64), np.ones(size, dtype=np.int64)
    rest = np.flatnonzero(rng.random(size - 1) < 0.7) + 1
    place[rest] = 1 + np.arange(len(rest))
    gone = np.setdiff1d(np.arange(1, size), rest)
    sign[gone] = rng.choice([-1, 1], len(gone))
    remaining = rng.choice([-1, 1], len(rest) + 1)
    remaining[0] = 1
    signs = np.where(place > 0, remaining[place], sign)
    whole, small = np.outer(signs, signs).astype(float), np.outer(remaining, remaining).astype(float)
    kept = (place[triangles.corner] == 0).sum(axis=1) <= 1
    merged = triangles.merged(place, sign)
    before = slacks(whole, triangles.corner[kept], triangles.kind[kept], SIGNS)
    assert (np.diff(merged.corner, axis=1) < 0).all()
    assert slacks(small, merged.corner, merged.kind, SIGNS) == pytest.approx(before)


def test_subtract_is_the_gradient_of_the_slacks():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 6))
    matrix = matrix + matrix.T
    triangles = Triangles.none().with_violated(matrix, 20, 0.0)
    weight = rng.random(len(triangles.corner))
    minus = np.zeros((6, 6))
    subtract(minus, triangles.corner, triangles.kind, weight, SIGNS)
    total = weight @ (slacks(matrix, triangles.corner, triangles.kind, SIGNS) - 1.0)
    assert -np.vdot(minus, matrix) == pytest.approx(total)


@pytest.mark.parametrize("equal", [False, True])
def test_the_worst_violations_are_found_beyond_a_full_list(monkeypatch, equal):
    rng = np.random.default_rng(0)
    matrix = -np.ones((12, 12)) if equal else rng.uniform(-1, 1, (12, 12))
    matrix = (matrix + matrix.T) / 2
    everything = Triangles.none().with_violated(matrix, 10_000, 0.0)
    worst = np.sort(slacks(matrix, everything.corner, everything.kind, SIGNS))[:5]
    monkeypatch.setattr("solvers.bounds.triangles._violated", first_of(50))
    monkeypatch.setattr("solvers.bounds.triangles.MOST_VIOLATED", 50)
    found = Triangles.none().with_violated(matrix, 5, 0.0)
    assert np.sort(slacks(matrix, found.corner, found.kind, SIGNS)) == pytest.approx(worst)


def first_of(most):
    """The search for violations, whose list holds ``most``."""
    from solvers.bounds.triangles import _violated

    return lambda matrix, least: tuple(part[:most] for part in _violated(matrix, least))
