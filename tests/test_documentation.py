"""The README, the start page, the guides and the concepts are run; elsewhere commands and flags are checked."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from qcompress.cli import app, main

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PAGES = [page for page in PAGES if "tutorials" not in page.parts and page.name != "cli.md"]


NOT_RUN = "# not run here: "
"""How a block begins that needs more than this machine has; the reader sees it too."""

GUIDES = [
    ROOT / "docs" / "start.md",
    *sorted((ROOT / "docs").glob("guides/*.md")),
    *sorted((ROOT / "docs").glob("concepts/*.md")),
]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_readmes_python_runs_as_it_is_shown(tmp_path):
    """All blocks together, in a folder of their own, as a reader would paste them."""
    program = "\n".join(text for language, text in blocks(ROOT / "README.md") if language == "python")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "small.safetensors").exists()


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with the start page's module, as a reader of the guides has it."""
    (module,) = [text for _, text in blocks(GUIDES[0]) if text.startswith("# my_model.py")]
    (tmp_path / "my_model.py").write_text(module)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("DWAVE_API_TOKEN", raising=False)  # no dry run asks the service
    monkeypatch.setenv("DWAVE_CONFIG_FILE", os.devnull)
    yield tmp_path
    sys.modules.pop("my_model", None)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page.stem in ("engines", "latency") else page for page in GUIDES],
    ids=lambda page: page.stem,
)
def test_a_guides_blocks_run_one_after_the_other(page, reader):
    """Python and commands, in the order of the page; what does not run says why."""
    names: dict[str, object] = {}
    for language, text in blocks(page):
        if language == "text" or text.startswith((NOT_RUN, "# my_model.py")):
            continue
        if language == "python":
            exec(compile(text, page.name, "exec"), names)  # noqa: S102
            continue
        for line in text.splitlines():
            words = shlex.split(line)
            assert words[0] == "qcompress", f"{page.name}: {line!r} is no command of ours: say why it is not run"
            assert main(words[1:]) == 0, line


def test_the_blocks_that_are_not_run_are_these():
    """The list of what a reader's first try is not checked for here."""
    reasons = {
        (page.stem, text.removeprefix(NOT_RUN).split("\n")[0])
        for page in GUIDES for _, text in blocks(page) if text.startswith(NOT_RUN)
    }  # fmt: skip
    assert reasons == {
        ("start", "installs packages"),
        ("budgets", "needs a language model in Hugging Face's form"),
        ("dwave", "installs packages"),
        ("dwave", "needs a D-Wave account"),
        ("engines", "needs a language model in Hugging Face's form"),
        ("large_models", "needs a language model in Hugging Face's form"),
        ("machines", "needs a cluster"),
    }


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
