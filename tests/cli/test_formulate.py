"""``qcompress formulate``: budgets in words and in numbers."""

import json

from qcompress.cli import main
from tests.cli.zoo import MEASURE, ran


def test_budgets_in_words_are_those_in_numbers(folder, capsys):
    ran(["measure", *MEASURE[1:], "--output", "m.npz"])
    capsys.readouterr()
    for words, limits in (
        (["bytes=30%"], {"bytes": 464}),
        (["bytes=0.9kB"], {"bytes": 900}),
        (["bits_per_weight=6.5", "macs=100%"], {"bits_per_weight": 6.5, "macs": 356}),
    ):
        ran(["formulate", "m.npz", *(word for limit in words for word in ("--budget", limit)), "--json"])
        assert json.loads(capsys.readouterr().out)["budgets"] == limits
    assert main(["formulate", "m.npz", "--budget", "loss=0.1"]) == 1
    assert "a limit on the loss needs a resource to minimize" in capsys.readouterr().err
