"""Kernels are compiled once on a machine, and whoever waits for that is told so, in one line."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
KERNELS = """
from solvers.kernels.compiled import compiled

@compiled
def twice(a):
    return 2 * a

@compiled
def thrice(a):
    return 3 * a

print(twice(1), thrice(1), thrice(1.0))
"""


RENAMED = """
from typing import NamedTuple
import numpy as np
from solvers.kernels.compiled import compiled

class {name}(NamedTuple):
    values: np.ndarray

@compiled
def total(pair):
    return pair.values.sum()

print(total({name}(np.ones(3))))
"""


def test_a_cache_of_an_earlier_version_is_replaced(tmp_path):
    """Numba reads the classes of arguments from a cache before it looks whether the cache is of this source."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    told = []
    for name in ("Before", "After", "After"):
        (tmp_path / "pairs.py").write_text(RENAMED.format(name=name))
        done = subprocess.run(
            [sys.executable, "-c", "import pairs"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == "3.0\n"
        told.append(bool(done.stderr))
    assert told == [True, True, False]


def test_a_kernel_is_compiled_again_when_the_module_of_one_that_it_calls_changes(tmp_path):
    (tmp_path / "twice.py").write_text(
        "from solvers.kernels.compiled import compiled\nfrom factors import scaled\n\n"
        "@compiled\ndef twice(a):\n    return 2 * scaled(a)\n\nprint(twice(1))\n"
    )
    for factor in (1, 10):
        (tmp_path / "factors.py").write_text(
            f"from solvers.kernels.compiled import compiled\n\n@compiled\ndef scaled(a):\n    return {factor} * a\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", "import twice"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == f"{2 * factor}\n"


def test_compiling_is_told_in_one_line_on_stderr_and_only_where_something_is_compiled(tmp_path):
    (tmp_path / "kernels.py").write_text(KERNELS)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def run() -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "kernels.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout, done.stderr

    first, second = run(), run()
    assert first[0] == second[0] == "2 3 3.0\n"
    assert first[1].startswith("qcompress: compiling numerical kernels on their first use; this takes")
    assert first[1].count("\n") == 1
    assert second[1] == ""
