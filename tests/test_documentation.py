"""What the documentation shows is run: Python of the start page and the README, words of the command line elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from qcompress.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PAGES = [page for page in PAGES if "tutorials" not in page.parts and page.name != "cli.md"]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "start.md"], ids=lambda page: page.name)
def test_the_first_pages_python_runs_as_it_is_shown(page, tmp_path):
    """All blocks of a page together, in a folder of their own, as a reader would paste them."""
    program = "\n".join(blocks(page, "python"))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "small.safetensors").exists()


def shown_commands() -> list[str]:
    """Every call of the command line in the documentation, in a block or between backticks."""
    texts = [page.read_text() for page in PAGES]
    lines = [
        line for text in texts for block in re.findall(r"^```.*?^```", text, re.M | re.S) for line in block.split("\n")
    ]
    lines += [inline for text in texts for inline in re.findall(r"`(qcompress [^`]*)`", text)]
    return sorted({re.sub(r"\s+#.*", "", line) for line in lines if re.match(r"qcompress [a-z]", line)})


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_and_flag_that_is_shown_exists(line):
    words = line.split()[1:]
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), f"{line!r} names no command"
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    asked = {word.split("=")[0] for word in words if word.startswith("--")}
    assert asked <= known | {"--help", "--debug"}, f"{line!r} has flags that {command.name!r} does not know"
