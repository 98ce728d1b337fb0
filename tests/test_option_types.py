"""A wrong type of a solver's option is one clear error, before anything runs."""

import re
from typing import Any

import pytest

from solvers import InvalidOptionError, registry, solve
from solvers.option_types import annotations, fits
from solvers.run import as_solver
from tests.test_search import two_layers

WRONG: tuple[Any, ...] = ("x", 2.5, 3, True, None, (), object())
OPTIONS = [(name, option) for name in registry.names() for option in registry.solver_class(name).option_defaults()]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_every_option_of_every_solver_refuses_other_types(name: str, option: str) -> None:
    solver = registry.solver_class(name)
    hint = annotations(solver)[option]
    wrong = [value for value in WRONG if not fits(value, hint)]
    assert wrong or hint is Any
    for value in wrong:
        with pytest.raises(InvalidOptionError, match=rf"option '{option}' of '{name}' must be .*, found "):
            solver(**{option: value})


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("anneal:sweeps=x", "option 'sweeps' of 'anneal' must be a whole number, found 'x'"),
        ("anneal:population=2.5", "option 'population' of 'anneal' must be a whole number, found 2.5"),
        ("ga:population=None", "option 'population' of 'ga' must be a whole number, found None"),
        ("sa:rounds=two", "option 'rounds' of 'sa' must be a whole number or None, found 'two'"),
        ("qpu:annealing_time_us=long", "'annealing_time_us' of 'qpu' must be a number or None, found 'long'"),
        ("qpu:simulated=1", "option 'simulated' of 'qpu' must be True or False, found 1"),
        ("milp:backend=5", "option 'backend' of 'milp' must be one of highs, cbc, found 5"),
    ],
)
def test_the_error_says_what_would_do_and_what_was_found(words: str, error: str) -> None:
    with pytest.raises(InvalidOptionError, match=re.escape(error)):
        as_solver(words)


def test_solve_refuses_a_wrong_type_by_name() -> None:
    with pytest.raises(InvalidOptionError, match="option 'sweeps' of 'anneal' must be a whole number, found 'abc'"):
        solve(two_layers(), "anneal", sweeps="abc")
