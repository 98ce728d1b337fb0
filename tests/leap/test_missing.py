"""Without the extra ``dwave`` and without a token everything else works, and what is missing is said."""

import json
import os
import subprocess
import sys

import pytest

from formulations import Problem

PROBLEM = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})

WITHOUT_THE_EXTRA = """
import importlib.metadata, sys

DISTRIBUTIONS = {"dwave-cloud-client", "dwave-optimization", "dwave-system", "fasteners", "minorminer"}
MODULES = ("dwave.cloud", "dwave.embedding", "dwave.graphs", "dwave.optimization", "dwave.system", "dwave_networkx",
           "fasteners", "minorminer")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if any(name == module or name.startswith(module + ".") for module in MODULES):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

version = importlib.metadata.version

def version_of(name):
    if name in DISTRIBUTIONS:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

sys.meta_path.insert(0, Absent())
importlib.metadata.version = version_of

import contextlib, io, json
from qcompress.cli import main

said = []
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    said.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(said))
"""

LEAP = ("leap-cqm", "leap-bqm", "leap-nl", "qpu", "qpu-decomposed")

SOLVERS = ("solvers", "--json")
WORKING = [("solve", "problem.npz", "--solver", solver, "--time-limit", "1", "--json") for solver in ("auto", "sa")]
NEEDY = [
    ("solve", "problem.npz", "--solver", "leap-nl"),
    ("solve", "problem.npz", "--solver", "qpu", "--option", "simulated=True"),
    ("leap", "submit", "problem.npz", "--solver", "leap-cqm"),
    ("leap", "submit", "problem.npz", "--solver", "leap-cqm", "--dry-run"),
    ("leap", "status", "one.job.json"),
    ("leap", "fetch", "one.job.json"),
    ("leap", "list"),
    ("leap", "solvers"),
]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Words of a command → exit code, stdout and stderr; all in one process without the extra and without a token."""
    folder = tmp_path_factory.mktemp("missing")
    PROBLEM.save(folder / "problem.npz")
    (folder / "one.job.json").write_text("{}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DWAVE_")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(folder)}
    commands = [SOLVERS, *WORKING, *NEEDY]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXTRA],
        input=json.dumps(commands),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(commands, json.loads(done.stdout), strict=True))


def test_the_table_of_solvers_says_what_to_install(said):
    code, out, _ = said[SOLVERS]
    assert code == 0
    shown = {one["name"]: one for one in json.loads(out)}
    assert not [name for name in LEAP if shown[name]["available"]]
    assert all("pip install 'qcompress[dwave]'" in shown[name]["why_not"] for name in LEAP)
    assert all(shown[name]["available"] for name in ("auto", "anneal", "milp", "sa", "tabu", "greedy"))


@pytest.mark.parametrize("words", WORKING, ids=" ".join)
def test_the_rest_of_the_program_works(said, words):
    code, out, _ = said[words]
    assert code == 0
    assert json.loads(out)["objective"] == 1.0


@pytest.mark.parametrize("words", NEEDY, ids=" ".join)
def test_a_command_that_needs_the_extra_says_what_to_install_in_one_line(said, words):
    code, out, err = said[words]
    assert (code, out) == (1, "")
    assert len(err.strip().splitlines()) == 1
    assert "pip install 'qcompress[dwave]'" in err
