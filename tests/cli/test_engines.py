"""``qcompress engines``: the list of engines."""

import json

from qcompress.cli.shared_flags import engine_of
from tests.cli.zoo import ran


def test_a_setting_that_is_a_text_is_taken_as_written():
    engine = engine_of("llama.cpp", ["source=7", "threads=2"])
    assert (engine.source, engine.threads) == ("7", 2)
    assert engine_of("compressed-tensors", ["tokenizer=None"]).tokenizer is None


def test_engines_are_listed(capsys):
    ran(["engines", "--json"])
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed["llama.cpp"]["available"]
    ran(["engines"])
    told = capsys.readouterr().out
    assert "GGUF" in told
    assert "without --target: the package's own file, for PyTorch" in told


def test_every_setting_is_listed_with_its_meaning(capsys):
    ran(["engines", "--json"])
    listed = {entry["name"]: entry["settings"] for entry in json.loads(capsys.readouterr().out)}
    assert listed["onnxruntime"]["threads"] == "number of threads; 0 for as many as there are cores. [default: 0]"
    assert all(not meaning.startswith("[") for settings in listed.values() for meaning in settings.values())
    ran(["engines"])
    assert "0 for as many as torch uses" in " ".join(capsys.readouterr().out.split())
