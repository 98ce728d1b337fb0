"""``qcompress measure``: loss, forward, latency, blocks of channels and left-out layers."""

import json

from formulations import Problem
from qcompress import Measurement
from qcompress.cli import main
from tests.cli.zoo import COMPRESS, MEASURE, ran


def test_measure_takes_a_loss_a_forward_low_rank_and_blocks_of_channels(folder, capsys):
    ran([*MEASURE, "--loss", "zoo_for_cli:squared", "--forward", "zoo_for_cli:first", "--output", "a.npz"])
    ran([*MEASURE, "--granularity", "4", "--ratios", "0.25", "--method", "direct", "--output", "b.npz"])
    a, b = Measurement.load("a.npz"), Measurement.load("b.npz")
    assert a.loss != b.loss == "kl"
    assert len(b.parts) > len(a.parts)
    assert b.method == "direct"


def test_measured_with_latency_it_can_be_budgeted(folder, capsys):
    ran([*MEASURE, "--low-rank", "--latency", "--forward", "zoo_for_cli:first", "--output", "m.npz"])
    assert "original latency_s" in capsys.readouterr().out
    ran(["formulate", "m.npz", "--budget", "latency_s=1", "--budget", "bytes=0.5", "--output", "p.npz"])
    timed = Measurement.load("m.npz")
    assert Problem.load("p.npz").budgets["latency_s"] == timed.original["latency_s"] > timed.fixed["latency_s"] > 0
    ran([*COMPRESS, "--budget", "latency_s=1", "--output", "run"])
    assert json.loads((folder / "run" / "report.json").read_text())["usage"]["latency_s"] > 0


def test_layers_are_left_out_by_name(folder, capsys):
    words = ["measure", "zoo_for_cli:network", "zoo_for_cli:batches", "--bits", "4", "--json", "--skip"]
    assert main([*words, "0,nothing*"]) != 0
    assert "no layer has a name like 'nothing*'; there are: 0, " in capsys.readouterr().err
    ran([*words, "0"])
    assert json.loads(capsys.readouterr().out)["skipped"]["0"] == "left out by skip='0'"
