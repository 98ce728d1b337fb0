"""``qcompress export`` and ``verify``: a language model's file, and words that are refused."""

import json

from formulations.generators.random_instances import layered_problem
from qcompress.cli import main
from tests.cli.zoo import ran


def test_a_language_model_goes_from_compress_to_export_and_verify(folder, capsys):
    from tests.engines.tiny import tiny

    tiny("llama", folder / "tiny")
    (folder / "language_zoo.py").write_text(
        "import torch, transformers\n"
        "def model():\n"
        "    return transformers.AutoModelForCausalLM.from_pretrained('tiny', dtype=torch.float32).eval()\n"
        "def text():\n"
        "    return [torch.arange(3, 27).view(2, 12), torch.arange(9, 33).view(2, 12)]\n"
    )
    words = ["language_zoo:model", "language_zoo:text", "--target", "llama.cpp", "--setting", "threads=1"]
    how = ["--method", "sampled", "--solver", "greedy", "--budget", "file_bytes=0.4", "--output", "small.gguf"]
    ran(["compress", *words, *how, "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["usage"]["file_bytes"] == (folder / "small.gguf").stat().st_size
    stored = ["language_zoo:model", "runs/model/model.safetensors"]
    engine = ["--target", "llama.cpp", "--setting", "threads=1"]
    ran(["export", *stored, *engine, "--output", "again.gguf"])
    assert (folder / "again.gguf").read_bytes() == (folder / "small.gguf").read_bytes()
    capsys.readouterr()
    ran(["verify", *stored, "again.gguf", "language_zoo:text", *engine, "--json"])
    assert json.loads(capsys.readouterr().out)["ok"]


def test_exporting_a_problem_names_the_word_for_it(folder, capsys):
    layered_problem(2).save("p.npz")
    assert main(["export", "p.npz", "p.mps"]) == 2
    assert "'qcompress convert p.npz p.mps'" in capsys.readouterr().err
    assert main(["export", "zoo_for_cli:network", "small.safetensors"]) == 2
    assert "name an engine" in capsys.readouterr().err
    assert main(["compress", "zoo_for_cli:network", "zoo_for_cli:batches", "-b", "bytes=0.5", "--setting", "a=1"]) == 2
    assert "--setting needs --target" in capsys.readouterr().err
