"""``qcompress export`` and ``verify``: a language model's file, and words that are refused."""

import json

import pytest

from formulations.generators.random_instances import layered_problem
from qcompress.cli import main
from qcompress.engines.registry import TABLE
from tests.cli.zoo import ran

ZOO = ["zoo_for_cli:network", "zoo_for_cli:batches"]


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


@pytest.fixture
def toy(folder, monkeypatch):
    """The words that compress the zoo's network for an engine of a few lines, without --output."""
    (folder / "toy_zoo.py").write_text(
        "from dataclasses import dataclass\n"
        "from tests.engines.toy import Toy\n"
        "import zoo_for_cli\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class ZooToy(Toy):\n"
        "    factory: object = zoo_for_cli.network\n"
    )
    monkeypatch.setitem(TABLE, "toy", "toy_zoo:ZooToy")
    return ["compress", *ZOO, "--solver", "greedy", "--no-guard", "--target", "toy", "--budget"]


def test_a_run_says_whose_results_it_replaces_and_verify_that_they_are_gone(toy, folder, capsys):
    def told(words):
        ran(words)
        return capsys.readouterr().err

    first = [*toy, "file_bytes=60%", "--output", "1.toy"]
    second = [*toy, "file_bytes=80%", "--output", "2.toy"]
    assert "WARNING: runs" not in told(first)
    assert "WARNING: runs" not in told(first)  # the same again
    assert "WARNING: runs" not in told([*second, "--folder", "runs/second"])
    verify = ["verify", ZOO[0], "runs/network/model.safetensors", "1.toy", ZOO[1], "--target", "toy"]
    ran(verify)
    told_before = told(second).split("wrote 2.toy")[0]
    assert (
        f"runs/network holds the results for {folder / '1.toy'}. If this run makes another choice, it replaces"
        in told_before
    )
    assert "name another folder with --folder" in told_before
    capsys.readouterr()
    assert main([*verify, "--json"]) == 1
    why = json.loads(capsys.readouterr().out)["why_not"]
    assert f"runs/network/model.safetensors holds the choice made for {folder / '2.toy'}, not for this file" in why
    ran(["verify", ZOO[0], "runs/second/model.safetensors", "2.toy", ZOO[1], "--target", "toy"])
    assert f"holds the results for {folder / '2.toy'}" in told(["compress", *ZOO, "--budget", "bytes=0.5"])


def test_a_run_for_an_engine_without_output_says_that_it_wrote_no_file(toy, capsys):
    ran([*toy, "file_bytes=60%"])
    assert "no file for toy was written, and nothing was verified" in capsys.readouterr().err
    ran([*toy, "file_bytes=60%", "--output", "small.toy"])
    told = capsys.readouterr().err
    assert "nothing was verified" not in told
    assert "reused from an earlier run: " in told
    assert main(["compress", *ZOO, "--budget", "bytes=0.5", "--folder", "x"]) == 2
    assert "--folder is for --target" in capsys.readouterr().err


def test_a_folder_in_place_of_a_compressed_model_is_one_clear_error(folder, capsys):
    (folder / "ct1").mkdir()
    assert main(["verify", ZOO[0], "ct1", "ct1", ZOO[1], "--target", "llama.cpp"]) == 1
    assert "error: ct1 is a folder, but a compressed model is one file, such as model" in capsys.readouterr().err
    (folder / "run" / "codes").mkdir(parents=True)
    for compressed in ("run", "run/model.safetensors"):
        assert main(["export", ZOO[0], compressed, "--target", "llama.cpp"]) == 2
        assert "run holds no model.safetensors, because 'compress' read the model block by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", *ZOO[:1], "a", "b", "--target", "llama.cpp"], "give DATA"),
        (["verify", *ZOO[:1], "a", "b", ZOO[1], "--text", "c", "--target", "llama.cpp"], "--text is for MODEL hf:"),
        (["verify", *ZOO[:1], "a", "b", "--text", "c", "--target", "llama.cpp"], "--text is for MODEL hf:FOLDER"),
        (["export", "hf:nowhere", "a", "--target", "llama.cpp"], "there is no folder 'nowhere'"),
        (["apply", "hf:model", "a", "b"], "hf:FOLDER and gguf:FILE are for 'compress', 'measure', 'export' and"),
    ],
)
def test_words_about_language_models_that_do_not_go_together_are_refused(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_an_engine_that_traces_names_the_flag_for_its_batch(folder, capsys):
    pytest.importorskip("onnxruntime")
    ran(["compress", *ZOO, "--budget", "bytes=0.5", "--solver", "greedy", "--no-guard"])
    capsys.readouterr()
    assert main(["export", ZOO[0], "runs/network/model.safetensors", "--target", "onnxruntime"]) == 1
    assert "give example=, a batch (--data on the command line)" in capsys.readouterr().err
