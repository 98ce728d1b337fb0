"""Further cases of a test are slow: `make test` runs the first or the most different ones, `make test-all` all."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`, of which all that are not among ``quick`` are marked as slow."""
    cases = list(cases)
    missing = [case for case in quick if case not in cases]
    assert not missing, f"{missing} are no cases"
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
