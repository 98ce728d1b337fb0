"""Writes ``cli.md``, the help of every command, from the command line itself."""

from pathlib import Path

from sphinx.application import Sphinx


def write_help(app: Sphinx) -> None:
    """Write the help of every command as typer formats it for people."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from qcompress.cli import app as commands

    runner = CliRunner(env={"TERM": "dumb", "COLUMNS": "100", "NO_COLOR": "1"})
    pages = ["# Command line\n\nEach command's `--help`, as it is printed.\n"]

    def add(words: list[str], command: object) -> None:
        printed = runner.invoke(commands, [*words, "--help"], prog_name="qcompress")
        if printed.exit_code != 0:
            raise RuntimeError(f"qcompress {' '.join(words)} --help failed: {printed.output}")
        title = " ".join(["qcompress", *words])
        lines = "\n".join(line.rstrip() for line in printed.output.strip().splitlines())
        pages.append(f"{'#' * min(2 + max(len(words) - 1, 0), 4)} {title}\n\n```text\n{lines}\n```\n")
        for name, inner in getattr(command, "commands", {}).items():
            add([*words, name], inner)

    add([], get_command(commands))
    target = Path(app.srcdir) / "cli.md"
    text = "\n".join(pages)
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the page before Sphinx reads its sources."""
    app.connect("builder-inited", write_help)
    return {"parallel_read_safe": True}
