"""The layers hold, and importing the package brings in nothing that only some users need."""

import ast
import importlib
import json
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from pkgutil import walk_packages

import pytest
from importlinter.cli import lint_imports

import formulations
import qcompress
import solvers
from tests.conftest import DRAWN_WHILE_COLLECTING

HEAVY = (
    "dimod", "dwave", "highspy", "joblib", "matplotlib", "numba", "ortools", "pandas", "pulp",
    "pymoo", "pyscipopt", "rich", "sklearn", "typer",
)  # fmt: skip
"""What a plain ``import qcompress`` must not import, unless torch does it by itself."""


ROOT = Path(__file__).parents[1]

MAX_FILE, MAX_FUNCTION, MAX_MEDIAN = 400, 60, 130
"""Lines of a module, of a function without its docstring, and of the median module of a package."""

LONG_FUNCTIONS: dict[str, str] = {}
"""Functions that are longer (``"solvers/run.py: solve"``), and why; there are none."""


def imported_by(statement):
    """The top-level and dotted modules that a fresh interpreter holds after ``statement``."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


def test_imports_go_downward_only(monkeypatch, capsys):
    """The contracts in pyproject.toml: qcompress above solvers above formulations, and no torch below qcompress."""
    monkeypatch.setattr("importlinter.cli._configure_logging", lambda verbose: None)  # it silences all other loggers
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


def test_the_version_is_that_of_the_installed_package():
    assert qcompress.__version__ == version("qcompress")


def test_importing_qcompress_imports_nothing_heavy_besides_torch():
    by_torch = imported_by("import torch, scipy.sparse")
    ours = imported_by("import qcompress")
    assert not {name for name in HEAVY if name in ours - by_torch}
    assert "torch" in ours


@pytest.mark.parametrize("package", ["formulations", "solvers"])
def test_the_lower_layers_need_neither_torch_nor_any_back_end(package):
    names = imported_by(f"import {package}")
    assert not {name for name in ("torch", "qcompress", *HEAVY) if name in names}


def test_asking_what_is_available_imports_no_back_ends_library():
    """`available` looks whether a library is there without importing it (no licence, no network, no start-up time)."""
    names = imported_by("import solvers; solvers.available()")
    assert not {name for name in ("torch", "dimod", "dwave", "highspy", "ortools", "pulp", "pymoo") if name in names}


def test_the_help_of_the_command_line_imports_no_back_end():
    names = imported_by("import contextlib, io\nfrom qcompress.cli import main\n"
                        "with contextlib.redirect_stdout(io.StringIO()): main(['--help'])")  # fmt: skip
    assert not {
        name for name in ("dimod", "highspy", "matplotlib", "numba", "pulp", "pymoo", "sklearn") if name in names
    }


def test_importing_tests_draws_no_random_numbers(pytestconfig):
    """Weights and inputs that a module or a list of parameters holds would be others in every run."""
    assert pytestconfig.stash[DRAWN_WHILE_COLLECTING] == []


def test_tests_seed_the_generators_that_they_make():
    unseeded = re.compile(r"\b(default_rng|RandomState|Random)\(\s*\)|\.seed\(\s*\)")
    root = Path(__file__).parents[1]
    found = [str(path) for place in ("tests", "benchmarks") for path in (root / place).rglob("*.py")
             if unseeded.search(path.read_text(encoding="utf-8"))]  # fmt: skip
    assert not found


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def function_lengths(path):
    """Name and number of lines, docstring left out, of every function of a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if documented else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring


@pytest.mark.parametrize("package", ["formulations", "solvers", "qcompress"])
def test_modules_hold_one_idea_each(package):
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules(package)}
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > MAX_FILE} == {}
    assert statistics.median(lengths.values()) < MAX_MEDIAN


def test_functions_fit_on_a_page_or_are_listed_with_a_reason():
    long = {
        f"{path.relative_to(ROOT)}: {name}"
        for package in ("formulations", "solvers", "qcompress")
        for path in modules(package)
        for name, length in function_lengths(path)
        if length > MAX_FUNCTION
    }
    assert long == set(LONG_FUNCTIONS), "split it, or give the reason; take what is short off the list"


def test_a_public_class_name_means_one_thing():
    """In a traceback or a search, the name alone tells which class is meant."""
    places = defaultdict(list)
    for package in ("formulations", "solvers", "qcompress"):
        for path in modules(package):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_no_public_name_is_that_of_a_module_beside_it():
    """Or the module takes its place as soon as it is imported.

    `qcompress.engines` is both on purpose: the function is public, the package holds one file an engine.
    """
    hidden = set()
    for package in (formulations, solvers, qcompress):
        for info in walk_packages(package.__path__, f"{package.__name__}."):
            parent, _, leaf = info.name.rpartition(".")
            if leaf in getattr(importlib.import_module(parent), "__all__", ()):
                hidden.add(info.name)
    assert hidden == {"qcompress.engines"}
