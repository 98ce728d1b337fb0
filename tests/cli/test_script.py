"""The installed ``qcompress`` script, before and after the command line is imported."""

import importlib.metadata
import signal
import sys
import tomllib
from pathlib import Path

import pytest

import qcompress_script

ROOT = Path(__file__).parents[2]


def test_the_script_is_what_gets_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    name = project["project"]["scripts"]["qcompress"]
    assert importlib.metadata.EntryPoint("qcompress", name, "console_scripts").load() is qcompress_script.main
    assert project["tool"]["setuptools"]["py-modules"] == [name.partition(":")[0]]


@pytest.fixture(autouse=True)
def handler():
    """Python's own handler of Ctrl-C, which a test run in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_importing_ends_with_130_and_no_traceback(monkeypatch, capfd):
    class Ended(BaseException):
        """Stands for the end of the process."""

    class Interrupting:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "qcompress.cli":
                signal.raise_signal(signal.SIGINT)

    def end(status):
        raise Ended(status)

    monkeypatch.setattr("os._exit", end)
    monkeypatch.delitem(sys.modules, "qcompress.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupting, *sys.meta_path])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Ended) as ended:
        qcompress_script.main()
    assert ended.value.args == (130,)
    assert capfd.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGINT) is before


def test_afterwards_ctrl_c_is_the_commands_affair(monkeypatch):
    seen = []
    monkeypatch.setattr("qcompress.cli.main", lambda: seen.append(signal.getsignal(signal.SIGINT)) or 3)
    assert qcompress_script.main() == 3
    assert seen == [signal.default_int_handler]
