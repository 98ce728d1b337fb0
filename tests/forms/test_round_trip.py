"""Every form has the same two words: what `encode` makes of a choice, `decode` makes a choice again."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formulations import Problem, to_bqm, to_cqm, to_integer_program, to_nonlinear
from formulations.forms.bqm import ENCODINGS
from formulations.generators.random_instances import small_problem

FORMS = {
    **{f"bqm, {name}": lambda problem, name=name: priced(problem, name) for name in ENCODINGS},
    "cqm": to_cqm,
    "integer program": to_integer_program,
    "nonlinear": to_nonlinear,
}


def priced(problem: Problem, encoding: str) -> Any:
    """The QUBO with budgets at a price, for uses in fractions have no slack bits."""
    return to_bqm(problem, encoding, prices=dict.fromkeys(problem.budgets, 0.5))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_choice_comes_back_from_its_sample(form: str, seed: int) -> None:
    problem = small_problem(seed)
    choice = np.random.default_rng(seed).integers(0, np.diff(problem.group_offsets))
    encoded = FORMS[form](problem)
    assert encoded.decode(encoded.encode(choice)).tolist() == choice.tolist()
