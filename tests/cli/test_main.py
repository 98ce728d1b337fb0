"""The command line as a whole: every step leaves its file, and ``--json`` is JSON and nothing else."""

import json
import runpy

import pytest
import torch

import qcompress
from formulations import Problem
from qcompress import Measurement, load_compressed
from qcompress.cli import main
from solvers import Solution, available
from tests.cli.zoo import COMPRESS, MEASURE, ran

FAILURE = 1
COMMANDS = [
    "demo", "compress", "measure", "formulate", "solve", "apply", "finetune", "solvers", "compare", "sweep", "convert",
    "engines", "export", "verify", "show",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_an_example(command, capsys):
    ran([command, "--help"])
    assert f"Example: qcompress {command}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_help_lists_every_command(words, capsys):
    ran(words)
    shown = capsys.readouterr().out
    assert all(f" {command} " in shown for command in COMMANDS)


def test_the_version_is_printed(capsys):
    ran(["--version"])
    assert capsys.readouterr().out == f"qcompress {qcompress.__version__}\n"


def test_from_a_model_to_a_smaller_model_step_by_step(folder, capsys):
    ran([*MEASURE, "--output", "m.npz"])
    ran(["formulate", "m.npz", "--budget", "bytes=0.3", "--budget", "macs=1.0", "--output", "p.npz"])
    ran(["solve", "p.npz", "--solver", "brute-force"])
    ran(["apply", "zoo_for_cli:network", "m.npz", "p.solution.json", "--output", "small.safetensors"])
    problem, solution = Problem.load("p.npz"), Solution.load("p.solution.json")
    assert solution.problem_fingerprint == problem.fingerprint()
    assert dict(problem.budgets) == {
        name: float(int(Measurement.load("m.npz").original[name] * share))
        for name, share in (("bytes", 0.3), ("macs", 1))
    }
    import zoo_for_cli

    loaded = load_compressed("small.safetensors", zoo_for_cli.network)
    assert not torch.equal(loaded[0].weight, zoo_for_cli.network()[0].weight)
    capsys.readouterr()
    for words, expected in (
        (["m.npz"], "Measurement by fisher (kl) over 48 samples: 3 parts"),
        (["p.npz"], "Problem: 3 groups"),
        (["p.solution.json"], "OPTIMAL (by brute-force"),
        (["p.solution.json", "--problem", "p.npz"], "8 bits"),
        (["small.safetensors"], "Compressed model"),
    ):
        ran(["show", *words])
        assert expected in capsys.readouterr().out


def test_json_is_all_there_is_on_stdout(folder, capsys):
    for words, key in (
        ([*MEASURE, "--output", "m.npz", "--json"], "options"),
        (["formulate", "m.npz", "--budget", "bytes=0.3", "--json"], "budgets"),
        (["solve", "problem.npz", "--solver", "brute-force", "--output", "s.json", "--json"], "objective"),
        (["apply", "zoo_for_cli:network", "m.npz", "s.json", "--json"], "payload_bytes"),
        (["compare", "problem.npz", "--solver", "brute-force", "--seeds", "1", "--json"], "solutions"),
        (["sweep", "problem.npz", "--points", "3", "--json"], "points"),
        ([*COMPRESS, "--json"], "loss_measured"),
    ):
        ran(words)
        assert key in json.loads(capsys.readouterr().out)
    ran(["solvers", "--json"])
    assert [info["name"] for info in json.loads(capsys.readouterr().out)] == [info.name for info in available()]


def test_the_module_ends_with_the_commands_code(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["qcompress", "solve", "nowhere.npz"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("qcompress", run_name="__main__")
    assert ended.value.code == FAILURE


def test_debug_shows_where(folder):
    with pytest.raises(RuntimeError, match="the model's own error"):
        main(["measure", "zoo_for_cli:breaks", "zoo_for_cli:batches", "--debug"])


def test_ctrl_c_outside_the_solver_is_one_line(monkeypatch, capsys):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompress.demo.run_demo", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err.count("\n") == 1
