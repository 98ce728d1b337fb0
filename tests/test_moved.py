"""Import paths of earlier releases that documents name."""

import importlib

import pytest

import formulations.generators.rank_selection
import solvers.baselines


@pytest.mark.parametrize(
    ("earlier", "module"),
    [
        ("formulations.rank_selection", formulations.generators.rank_selection),
        ("solvers.selectors", solvers.baselines),
    ],
)
def test_an_earlier_name_is_the_same_module_and_leaves_it_as_it_is(earlier, module):
    """Both names give one module, which keeps its own name and specification."""
    assert importlib.import_module(earlier) is module
    assert module.__spec__.name == module.__name__ != earlier


def test_a_name_that_never_was_is_an_import_error_as_ever():
    with pytest.raises(ModuleNotFoundError, match="formulations.never_was"):
        importlib.import_module("formulations.never_was")
