"""Fine-tuning, by ``qcompress compress`` and ``qcompress finetune``."""

import json
import sys

import pytest

import qcompress.cli
from qcompress.cli import main
from qcompress.compressed.file import stored_parts
from tests.cli.zoo import TUNED, nats, payload, ran


def test_compress_fine_tunes_in_the_same_bytes_and_once(folder, monkeypatch, capsys):
    ran([*TUNED, "--output", "run", "--json"])
    report = json.loads(capsys.readouterr().out)
    ran(["apply", "zoo_for_cli:network", "run/measurement.npz", "run/solution.json", "--output", "before.safetensors"])
    before, after = "before.safetensors", "run/model.safetensors"
    assert report["loss_measured"] == pytest.approx(nats(before), rel=1e-6)
    assert report["loss_finetuned"] == pytest.approx(nats(after), rel=1e-6)
    assert report["loss_finetuned"] < report["loss_measured"]
    assert all("rank" in part["option"] for part in report["parts"][:2])
    assert [part["option"] for part in report["parts"]] == [stored.transform.label for stored in stored_parts(after)]
    assert payload(after) == payload(before) == report["usage"]["bytes"] <= report["budgets"]["bytes"]
    assert [stored.transform for stored in stored_parts(after)] == [
        stored.transform.nearest for stored in stored_parts(before)
    ]
    assert f"after fine-tuning {report['loss_finetuned']:.6g}" in (folder / "run/summary.md").read_text()
    content = (folder / after).read_bytes()
    (folder / "run/report.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["qcompress.steps.finishing"], "finetune", None)  # would fail if it were called
        ran([*TUNED, "--output", "run"])
    assert json.loads((folder / "run/report.json").read_text())["loss_finetuned"] == report["loss_finetuned"]
    assert (folder / after).read_bytes() == content
    for words in ([*TUNED, "--finetune-steps", "21"], [*TUNED, "--learning-rate", "0.1"], TUNED[:-4]):
        ran([*words, "--output", "run"])
        ran([*words, "--output", "fresh"])
        assert (folder / after).read_bytes() != content
        assert (folder / after).read_bytes() == (folder / "fresh/model.safetensors").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_compress_goes_on_with_a_training_that_was_cut(error, folder, monkeypatch, capsys):
    def cut(watch, progress):
        watch.finetuning = progress
        if progress.step == 7:
            raise error

    monkeypatch.setattr(sys.modules["qcompress.training.finetune"], "SAVE_EVERY_S", -1)
    with monkeypatch.context() as patched:
        patched.setattr(qcompress.cli.progress.Watch, "finetuned", cut)
        assert main([*TUNED, "--output", "cut"]) == (0 if error is KeyboardInterrupt else 1)
    assert (folder / "cut/finetune.part").exists()
    told = "fine-tuning ended after 7 of 20 steps: interrupted; the same command resumes it"
    assert (told in capsys.readouterr().err) == (folder / "cut/report.json").exists() == (error is KeyboardInterrupt)
    ran([*TUNED, "--output", "cut"])
    assert not (folder / "cut/finetune.part").exists()
    ran([*TUNED, "--output", "whole"])
    assert (folder / "cut/model.safetensors").read_bytes() == (folder / "whole/model.safetensors").read_bytes()


def test_finetune_gives_another_file_of_the_same_bytes(folder, capsys):
    ran([*TUNED[:-4], "--output", "run"])
    capsys.readouterr()
    words = ["finetune", "zoo_for_cli:network", "zoo_for_cli:batches", "run/model.safetensors", "--steps", "20"]
    ran([*words, "--learning-rate", "3e-3", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == "run/model.tuned.safetensors"
    assert told["loss_before"] == pytest.approx(nats("run/model.safetensors"), rel=1e-6)
    assert told["loss_after"] == pytest.approx(nats(told["file"]), rel=1e-6)
    assert told["loss_after"] < told["loss_before"]
    assert told["payload_bytes"] == payload(told["file"]) == payload("run/model.safetensors")
    ran([*words, "--validation", "zoo_for_cli:batches", "--learning-rate", "1e6", "--output", "same.safetensors"])
    out, err = capsys.readouterr()
    assert "fine-tuning ended after 10 of 20 steps: the loss stopped falling" in err
    assert "10 of 20" in out
    assert (folder / "same.safetensors").read_bytes() == (folder / "run/model.safetensors").read_bytes()
