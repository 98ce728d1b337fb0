"""``qcompress compress``: its folder, what it reuses, and what it names."""

import json

import pytest

from tests.cli.zoo import COMPRESS, nats, ran


def test_compress_leaves_everything_and_goes_on_where_it_was(folder, capsys):
    ran([*COMPRESS, "--evaluate", "zoo_for_cli:score", "--output", "run"])
    files = {file.name for file in (folder / "run").iterdir()}
    wanted = {"measurement.npz", "problem.npz", "solution.json", "model.safetensors", "report.json", "summary.md"}
    assert wanted <= files
    report = json.loads((folder / "run/report.json").read_text())
    assert report["usage"]["bytes"] <= report["budgets"]["bytes"]
    assert "Compression" in capsys.readouterr().out
    measured = (folder / "run/measurement.npz").stat().st_mtime_ns
    (folder / "run/report.json").unlink()
    ran([*COMPRESS, "--output", "run"])
    assert (folder / "run/measurement.npz").stat().st_mtime_ns == measured
    assert (folder / "run/report.json").exists()
    capsys.readouterr()
    ran(["show", "run"])
    assert "Compression" in capsys.readouterr().out
    ran([*COMPRESS, "--seed", "9", "--output", "run"])
    assert (folder / "run/measurement.npz").stat().st_mtime_ns != measured


def test_compress_keeps_the_measurement_for_another_budget_or_solver(folder, capsys):
    ran([*COMPRESS, "--output", "run"])
    measured = (folder / "run/measurement.npz").stat().st_mtime_ns
    capsys.readouterr()
    ran([*COMPRESS, "--budget", "macs=1", "--solver", "lagrangian", "--output", "run", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (set(report["budgets"]), report["solver"]) == ({"bytes", "macs"}, "lagrangian")
    assert (folder / "run/measurement.npz").stat().st_mtime_ns == measured


def test_compress_names_only_its_own_files_and_what_of_an_earlier_run_is_left(folder, capsys):
    wider = ["bytes=0.9" if word == "bytes=0.3" else word for word in COMPRESS]

    def told():
        lines = [line.split(": ", 1) for line in capsys.readouterr().err.splitlines() if ": " in line]
        return {what: set(names.split(", ")) for what, names in lines}

    ran([*COMPRESS, "--output", "run"])
    first = told()
    assert first["wrote to run"] == {path.name for path in (folder / "run").iterdir()}
    assert not any("earlier" in what for what in first)
    ran(["report", "run"])
    ran(["sweep", "run/problem.npz", "--points", "2"])
    capsys.readouterr()
    ran([*wider, "--output", "run"])
    second = told()
    refitted = {"refitted.npz"} & first["wrote to run"]  # serves any choice, but not every choice is fitted
    unused = refitted & second["left from an earlier run, not brought up to date"]
    assert second["reused from an earlier run"] == {"measurement.npz", "all_samples.npz"} | (refitted - unused)
    assert {"model.safetensors", "solved.json"} <= second["replaced, of an earlier run"] < second["wrote to run"]
    assert second["left from an earlier run, not brought up to date"] >= {"report.html", "problem.sweep.json"}
    ran([*wider, "--loss", "mse", "--output", "run"])
    assert not (folder / "run/agreement.json").exists()  # its page would show another run's changed answers


def test_compress_names_its_folder_after_the_model(folder, capsys):
    ran(COMPRESS)
    assert (folder / "runs/network/model.safetensors").exists()


def test_compress_refines_by_true_loss(folder, capsys):
    refining = [*COMPRESS, "--refine-rounds", "2", "--no-guard", "--output", "run"]
    ran([*refining, "--json"])
    report = json.loads(capsys.readouterr().out)
    refined = report["refined"]
    assert refined["loss"] <= refined["loss_before"]
    assert report["loss_measured"] == pytest.approx(nats("run/model.safetensors"), rel=1e-5)
    assert report["loss_measured"] == pytest.approx(refined["loss"], rel=1e-5)
    assert "measured again around the choice" in (folder / "run/summary.md").read_text()
    ran([*COMPRESS, "--output", "run"])
    assert json.loads((folder / "run/report.json").read_text())["refined"] is None
