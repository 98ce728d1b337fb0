"""An empty working folder with a model and data, for every test of a command."""

import pytest

from formulations.generators.random_instances import layered_problem
from qcompress.cli import console
from tests.cli.zoo import ZOO


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder with a module that holds a model and data."""
    (tmp_path / "zoo_for_cli.py").write_text(ZOO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(console.out, "_width", 200)  # whatever was the terminal when it was imported
    return tmp_path


@pytest.fixture
def problem_file(folder):
    layered_problem(5, bits=(2, 4, 8), rank=2, seed=1).save(folder / "problem.npz")
    return "problem.npz"
