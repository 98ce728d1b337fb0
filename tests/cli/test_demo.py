"""``qcompress demo``: its table."""

import json

from qcompress.demo import DemoResult, DemoRow
from tests.cli.zoo import ran


def test_the_demos_table(monkeypatch, capsys):
    row = DemoRow(
        solver="greedy", loss_predicted=0.01, bound=None, gap=None, status="FEASIBLE", loss_measured=0.02,
        size_bytes=900, accuracy=0.97, solve_s=0.1,
    )  # fmt: skip
    result = DemoResult(original_bytes=10_000, original_accuracy=0.98, budget_bytes=1000, rows=(row,))
    monkeypatch.setattr("qcompress.demo.run_demo", lambda **_: result)
    ran(["demo"])
    shown = capsys.readouterr().out
    assert "98.00%" in shown
    assert "97.00%" in shown
    ran(["demo", "--json"])
    assert json.loads(capsys.readouterr().out)["rows"][0]["size_bytes"] == 900
