"""``qcompress solvers``: the list of solvers with their options."""

from solvers import available
from tests.cli.zoo import ran


def test_solvers_are_listed_with_their_options(capsys):
    ran(["solvers"])
    shown = capsys.readouterr().out
    for info in available():
        assert info.name in shown
        assert all(f"{name}=" in shown for name in info.options)
