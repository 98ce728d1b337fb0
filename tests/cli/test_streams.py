"""Standard output holds the result and nothing else, whatever it is: a pipe, a file or a terminal."""

import contextlib
import json
import os
import pty
import sys
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from formulations import Problem
from formulations.generators.random_instances import layered_problem
from qcompress.cli import main
from tests.cli.zoo import COMPRESS, MEASURE, ZOO

SINKS = ("pipe", "file", "terminal")


class Sink:
    """A descriptor to write to, and all that was written there."""

    def __init__(self, kind: str, path: Path) -> None:
        self._path, self._chunks = path, list[bytes]()
        self._reader: threading.Thread | None = None
        if kind == "file":
            self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            return
        if kind == "pipe":
            source, self.descriptor = os.pipe()
        else:
            source, self.descriptor = pty.openpty()
            tty.setraw(self.descriptor)
        self._reader = threading.Thread(target=self._read, args=(source,))
        self._reader.start()

    def _read(self, source: int) -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while chunk := os.read(source, 1 << 16):
                self._chunks.append(chunk)
        os.close(source)

    def text(self) -> str:
        """Close, and give what was written."""
        os.close(self.descriptor)
        if self._reader is None:
            return self._path.read_text()
        self._reader.join()
        return b"".join(self._chunks).decode()


@contextlib.contextmanager
def descriptors(*targets: int) -> Iterator[None]:
    """While open, descriptors 1 and 2, and Python's streams, lead to these."""
    before, kept = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    try:
        for number, target in zip((1, 2), targets, strict=True):
            os.dup2(target, number)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w") for number in (1, 2))
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.close()
        sys.stdout, sys.stderr = before
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], tuple[int, str, str]]:
    """Run a command in an empty folder with its output in a kind of sink: exit status, stdout, stderr."""
    (tmp_path / "zoo_for_cli.py").write_text(ZOO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    layered_problem(5, bits=(2, 4, 8), rank=2, seed=1).save(tmp_path / "problem.npz")

    def command(kind: str, words: list[str]) -> tuple[int, str, str]:
        out, err = (Sink(kind, tmp_path / name) for name in ("out.txt", "err.txt"))
        with descriptors(out.descriptor, err.descriptor):
            status = main(words)
        return status, out.text(), err.text()

    return command


@pytest.mark.parametrize("kind", SINKS)
def test_every_command_writes_its_result_alone_to_stdout(
    kind: str, run: Callable[[str, list[str]], tuple[int, str, str]]
) -> None:
    commands = (
        ["solvers", "--json"],
        ["engines", "--json"],
        [*MEASURE, "--output", "m.npz", "--json"],
        ["formulate", "m.npz", "--budget", "bytes=0.3", "--json"],
        ["solve", "problem.npz", "--solver", "brute-force", "--output", "s.json", "--json"],
        ["apply", "zoo_for_cli:network", "m.npz", "s.json", "--output", "small.safetensors", "--json"],
        ["compare", "problem.npz", "--solver", "brute-force", "--solver", "greedy", "--seeds", "1", "--json"],
        ["sweep", "problem.npz", "--points", "2", "--json"],
        [*COMPRESS, "--output", "run", "--json"],
    )
    for words in commands:
        status, out, err = run(kind, words)
        assert status == 0, (words, err)
        json.loads(out)
    for words in (["show", "m.npz"], ["show", "small.safetensors"]):
        status, out, err = run(kind, words)
        assert (status, err) == (0, "")
        assert out.strip()


@pytest.mark.parametrize("kind", SINKS)
def test_an_error_is_one_line_on_stderr_and_nothing_on_stdout(
    kind: str, run: Callable[[str, list[str]], tuple[int, str, str]]
) -> None:
    for words in (
        ["solve", "no_such_file.npz"],
        ["solve", "problem.npz", "--solver", "no-such-solver"],
        ["measure", "zoo_for_cli:nothing", "zoo_for_cli:batches"],
    ):
        status, out, err = run(kind, words)
        assert status != 0
        assert out == ""
        assert err.strip()
        assert "Traceback" not in err


@pytest.mark.parametrize("kind", SINKS)
def test_why_budgets_are_impossible_belongs_to_the_error_unless_json_is_asked_for(
    kind: str, run: Callable[[str, list[str]], tuple[int, str, str]]
) -> None:
    Problem.load("problem.npz").with_budgets(bytes=1).save("impossible.npz")
    for words in ([*COMPRESS[:-4], "--budget", "bytes=0.00001"], ["solve", "impossible.npz"]):
        status, out, err = run(kind, words)
        assert (status, out) == (1, "")
        assert "smallest alone" in err
        assert err.splitlines()[-1].lstrip("\x1b[31m").startswith("error: no choice meets the budget")
        status, out, err = run(kind, [*words, "--json"])
        assert status == 1
        assert "infeasibility" in json.loads(out)
        assert "smallest alone" not in err


def test_what_cannot_be_written_to_stdout_is_an_error_that_names_it(
    tmp_path: Path, run: Callable[[str, list[str]], tuple[int, str, str]]
) -> None:
    del run  # for its folder
    for words in (["solvers"], ["solvers", "--json"], ["show", "problem.npz"], ["engines"]):
        with Path("/dev/full").open("w") as full, (tmp_path / "err.txt").open("w") as told:
            with descriptors(full.fileno(), told.fileno()):
                assert main(words) == 1
            assert (tmp_path / "err.txt").read_text() == "error: No space left on device: standard output\n"


def test_progress_is_drawn_on_a_terminal_only(run: Callable[[str, list[str]], tuple[int, str, str]]) -> None:
    words = [*COMPRESS, "--json"]
    drawn = {kind: run(kind, [*words, "--output", f"run-{kind}"])[2] for kind in SINKS}
    assert "\x1b[" in drawn["terminal"]
    assert not any("\x1b[" in drawn[kind] or "\r" in drawn[kind] for kind in ("pipe", "file"))


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_file_written_to_stdout_is_alone_there(
    kind: str, run: Callable[[str, list[str]], tuple[int, str, str]]
) -> None:
    """What the command says besides goes to stderr; a text file, so that the sink can be read as text."""
    expected = run(kind, ["solve", "problem.npz", "--solver", "brute-force", "--output", "s.json"])
    assert expected[0] == 0
    for words in (["--output", "/dev/stdout"], ["--output=/dev/fd/1"]):
        status, out, err = run(kind, ["solve", "problem.npz", "--solver", "brute-force", *words])
        assert status == 0
        assert json.loads(out)["choice"] == json.loads(Path("s.json").read_text())["choice"]
        assert "OPTIMAL" in err
    assert "OPTIMAL" in run(kind, ["solve", "problem.npz", "--solver", "brute-force"])[1]


def test_an_interrupt_inside_compiled_code_is_an_interrupt(
    run: Callable[[str, list[str]], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    monkeypatch.setattr(Problem, "load", interrupted)
    status, out, err = run("pipe", ["solve", "problem.npz", "--solver", "brute-force"])
    assert (status, out) == (130, "")
    assert "interrupted" in err


NOISY = """
import zoo_for_cli

print("imported")


def network():
    print("made")
    return zoo_for_cli.network()


def batches():
    print("read")
    return zoo_for_cli.batches()


def forward(model, batch):
    print("run")
    return model(batch)
"""


def test_what_the_callers_modules_print_is_kept_out_of_json_and_of_files(
    folder: Path, run: Callable[[str, list[str]], tuple[int, str, str]]
) -> None:
    (folder / "noisy_zoo.py").write_text(NOISY)
    command = ["measure", "noisy_zoo:network", "noisy_zoo:batches", "--forward", "noisy_zoo:forward", "--bits", "4"]
    code, out, err = run("pipe", [*command, "--json"])
    assert code == 0
    assert "file" in json.loads(out)
    assert all(word in err.splitlines() for word in ("made", "read", "run"))
