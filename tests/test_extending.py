"""The pages on extending are whole: the files they show, put into an empty folder, pass the tests that they show."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quick import slow_but

ROOT = Path(__file__).parent.parent
PAGES = ("solver", "reduction", "formulation", "transform", "engine")


def files_of(page: Path) -> dict[str, str]:
    """Name → content of every block that begins with the comment ``# name``."""
    blocks = re.findall(r"^```\w+\n(# (\S+)\n.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return {name: content for content, name in blocks}


def install(folder: Path, into: Path) -> None:
    """Build the package in ``folder`` with the setuptools that is here, and install it as its page says."""
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--disable-pip-version-check"]
    run = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(into), str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", slow_but(("solver", "reduction", "formulation"), PAGES))
def test_what_a_page_shows_is_a_whole_package_that_passes_its_tests(name, tmp_path):
    files = files_of(ROOT / "docs" / "extend" / f"{name}.md")
    assert [file for file in files if file.startswith("test_")]
    package, installed = tmp_path / "package", tmp_path / "installed"
    package.mkdir()
    for file, content in files.items():
        (package / file).write_text(content, encoding="utf-8")
    if "pyproject.toml" in files:
        install(package, installed)
        assert list(installed.glob("*.dist-info/entry_points.txt"))
        tests = tmp_path / "tests"  # away from the source, so that only what is installed can be imported
        tests.mkdir()
        for file in package.glob("test_*.py"):
            file.rename(tests / file.name)
    else:
        tests = installed = package
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "."],
        cwd=tests, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": f"{ROOT}:{installed}", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
