"""The pages on extending are whole: the files they show, put into an empty folder, pass the tests that they show."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("solver", "reduction", "formulation", "transform", "engine")


def files_of(page: Path) -> dict[str, str]:
    """Name → content of every block that begins with the comment ``# name``."""
    blocks = re.findall(r"^```\w+\n(# (\S+)\n.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return {name: content for content, name in blocks}


def install(folder: Path, project: str) -> None:
    """What an installer writes down of a project: its name, version and entry points."""
    stated = tomllib.loads(project)["project"]
    info = folder / f"{stated['name'].replace('-', '_')}-{stated['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {stated['name']}\nVersion: {stated['version']}\n")
    with (info / "entry_points.txt").open("w") as file:
        for group, points in stated["entry-points"].items():
            print(f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), sep="\n", file=file)


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_shows_is_a_whole_package_that_passes_its_tests(name, tmp_path):
    files = files_of(ROOT / "docs" / "extend" / f"{name}.md")
    assert [file for file in files if file.startswith("test_")]
    for file, content in files.items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    if "pyproject.toml" in files:
        install(tmp_path, files["pyproject.toml"])
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "."],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
