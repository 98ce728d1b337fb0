"""``qcompress engines``: the list of engines."""

import json

from tests.cli.zoo import ran


def test_engines_are_listed(capsys):
    ran(["engines", "--json"])
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed["llama.cpp"]["available"]
    ran(["engines"])
    assert "GGUF" in capsys.readouterr().out
