"""The command line: every step leaves its file, ``--json`` is JSON and nothing else, a mistake is one clear line."""

import inspect
import json
import re
import runpy
import sys
from dataclasses import dataclass
from typing import get_type_hints

import pytest
import safetensors.numpy
import torch

import qcompress.cli
from formulations import Problem
from formulations.generators.random_instances import layered_problem
from qcompress import Measurement, load_compressed, low_rank, prune_channels, prune_quantize
from qcompress.cli import arguments, console, main
from qcompress.cli.flag_groups import with_flag_groups
from qcompress.cli.offering import OfferFlags
from qcompress.compressed.file import stored_parts
from qcompress.demo import DemoResult, DemoRow
from qcompress.options import SPARSITY, SPARSITY_IN_GROUPS
from solvers import Solution, StopReason, available
from solvers.compare.runs import Comparison, Suite
from solvers.sweep import Sweep

ZOO = """
import torch
from torch import nn

NUMBER = 3
calls = []


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def batches():
    torch.manual_seed(1)
    return [torch.randn(16, 8) for _ in range(3)]


def once():
    return (batch for batch in batches())


def breaks():
    raise RuntimeError("the model's own error,\\nin two lines")


def score(model):
    return float(model(batches()[0]).argmax(1).float().mean())


def squared(output, batch):
    return output.square().sum(1)


def first(model, batch):
    return model(batch)
"""
MEASURE = ["measure", "zoo_for_cli:network", "zoo_for_cli:batches", "--bits", "2,4,8", "--sparsity", "0"]
COMPRESS = ["compress", *MEASURE[1:], "--budget", "bytes=0.3", "--solver", "brute-force"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working folder with a module that holds a model and data."""
    (tmp_path / "zoo_for_cli.py").write_text(ZOO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(console.out, "_width", 200)  # whatever was the terminal when it was imported
    return tmp_path


@pytest.fixture
def problem_file(folder):
    layered_problem(5, bits=(2, 4, 8), rank=2, seed=1).save(folder / "problem.npz")
    return "problem.npz"


def ran(arguments):
    """The command ends well."""
    assert main(arguments) == 0


# --- help ----------------------------------------------------------------------------------------------------------

COMMANDS = [
    "demo",
    "compress",
    "measure",
    "formulate",
    "solve",
    "apply",
    "finetune",
    "solvers",
    "compare",
    "sweep",
    "convert",
    "engines",
    "export",
    "verify",
    "show",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_an_example(command, capsys):
    ran([command, "--help"])
    assert f"Example: qcompress {command}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_help_lists_every_command(words, capsys):
    ran(words)
    shown = capsys.readouterr().out
    assert all(f" {command} " in shown for command in COMMANDS)


# --- the way through -----------------------------------------------------------------------------------------------


def test_from_a_model_to_a_smaller_model_step_by_step(folder, capsys):
    ran([*MEASURE, "--output", "m.npz"])
    ran(["formulate", "m.npz", "--budget", "bytes=0.3", "--budget", "macs=1.0", "--output", "p.npz"])
    ran(["solve", "p.npz", "--solver", "brute-force"])
    ran(["apply", "zoo_for_cli:network", "m.npz", "p.solution.json", "--output", "small.safetensors"])
    problem, solution = Problem.load("p.npz"), Solution.load("p.solution.json")
    assert solution.problem_fingerprint == problem.fingerprint()
    assert dict(problem.budgets) == {
        name: float(int(Measurement.load("m.npz").original[name] * share))
        for name, share in (("bytes", 0.3), ("macs", 1))
    }
    import zoo_for_cli

    loaded = load_compressed("small.safetensors", zoo_for_cli.network)
    assert not torch.equal(loaded[0].weight, zoo_for_cli.network()[0].weight)
    capsys.readouterr()
    for words, expected in (
        (["m.npz"], "Measurement by fisher (kl) over 48 samples: 3 parts"),
        (["p.npz"], "Problem: 3 groups"),
        (["p.solution.json"], "OPTIMAL (by brute-force"),
        (["p.solution.json", "--problem", "p.npz"], "8 bits"),
        (["small.safetensors"], "Compressed model"),
    ):
        ran(["show", *words])
        assert expected in capsys.readouterr().out


def test_json_is_all_there_is_on_stdout(folder, capsys):
    for words, key in (
        ([*MEASURE, "--output", "m.npz", "--json"], "options"),
        (["formulate", "m.npz", "--budget", "bytes=0.3", "--json"], "budgets"),
        (["solve", "problem.npz", "--solver", "brute-force", "--output", "s.json", "--json"], "objective"),
        (["apply", "zoo_for_cli:network", "m.npz", "s.json", "--json"], "payload_bytes"),
        (["compare", "problem.npz", "--solver", "brute-force", "--seeds", "1", "--json"], "solutions"),
        (["sweep", "problem.npz", "--points", "3", "--json"], "points"),
        ([*COMPRESS, "--json"], "loss_measured"),
    ):
        ran(words)
        assert key in json.loads(capsys.readouterr().out)
    ran(["solvers", "--json"])
    assert [info["name"] for info in json.loads(capsys.readouterr().out)] == [info.name for info in available()]


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


FACTORS = low_rank(ranks=(4, 8), kinds=("channels", "sliced"), slices=(2,), whitened=True)
RANKED = ["--ranks", "4,8", "--kinds", "channels,sliced", "--slices", "2", "--factor-bits", "3,4"]
BITS = prune_quantize(compensated=True)
OFFERED = [
    ([], BITS),
    (["--compensated"], BITS),
    (["--no-compensated"], prune_quantize()),
    (["--bits", "4", "--sparsity", "0,0.5"], prune_quantize(bits=(4,), sparsity=(0, 0.5), compensated=True)),
    (["--low-rank"], BITS + low_rank(whitened=True)),
    (["--no-whitened"], BITS + low_rank(whitened=False)),
    (["--ratios", "0.25,0.5"], BITS + low_rank(ratios=(0.25, 0.5), whitened=True)),
    (["--no-prune-quantize", "--energies", "0.9"], low_rank(energies=(0.9,), whitened=True)),
    (["--no-prune-quantize", "--kinds", "tucker, channels"], low_rank(kinds=("tucker", "channels"), whitened=True)),
    (["--no-prune-quantize", "--no-whitened"], low_rank(whitened=False)),
    (
        ["--no-prune-quantize", *RANKED],
        FACTORS + FACTORS.then(prune_quantize(bits=(3, 4), sparsity=(0,), compensated=True)),
    ),
    (
        ["--no-prune-quantize", "--no-compensated", *RANKED],
        FACTORS + FACTORS.then(prune_quantize(bits=(3, 4), sparsity=(0,))),
    ),
    (
        ["--no-whitened", "--no-compensated", "--factor-bits", "8", "--factor-sparsity", "0,0.5"],
        prune_quantize()
        + low_rank(whitened=False)
        + low_rank(whitened=False).then(prune_quantize(bits=(8,), sparsity=(0, 0.5))),
    ),
    (
        ["--bits", "3,4", "--group-size", "32,64", "--asymmetric"],
        prune_quantize(bits=(3, 4), group_size=(32, 64), symmetric=False, compensated=True),
    ),
    (["--channels"], prune_channels()),
    (["--keep", "0.5,0.25", "--channel-block", "4"], prune_channels(keep=(0.5, 0.25), granularity=4)),
]


def help_of(flag):
    """The help of one of the flags that enable options."""
    return get_type_hints(OfferFlags, include_extras=True)[flag].__metadata__[0].help


@pytest.mark.parametrize(
    ("function", "name"),
    [(prune_quantize, "bits"), (low_rank, "kinds"), (low_rank, "slices")],
)
def test_the_help_names_the_librarys_defaults(function, name):
    default = inspect.signature(function).parameters[name].default
    text = help_of(name)
    words = ",".join(own if isinstance(own, str) else f"{own:g}" for own in default)
    assert text.endswith(f"Default: {words}.")


def test_the_help_names_the_librarys_sparsity():
    text = help_of("sparsity")
    shares, grouped = (",".join(f"{share:g}" for share in each) for each in (SPARSITY, SPARSITY_IN_GROUPS))
    assert text.endswith(f"Default: {shares}; with groups {grouped}.")


@pytest.mark.parametrize(("words", "options"), OFFERED, ids=[" ".join(words) for words, _ in OFFERED])
@pytest.mark.parametrize("command", [MEASURE[:3], ["compress", *MEASURE[1:3], "--budget", "bytes=0.5"]])
def test_words_put_on_offer_what_the_library_calls_the_same(command, words, options, monkeypatch):
    found = {}

    class EnoughError(Exception):
        pass

    def keep(*given, **named):
        found.update(named, options=given[2] if len(given) > 2 else named["options"] or BITS)
        raise EnoughError

    monkeypatch.setattr("qcompress.measure", keep)
    monkeypatch.setattr("qcompress.compress", keep)
    with pytest.raises(EnoughError):
        main([*command, *words, "--debug"])
    assert found["options"] == options


@pytest.mark.parametrize("command", [MEASURE[:3], ["compress", *MEASURE[1:3], "--budget", "bytes=0.5"]])
def test_patterns_of_layers_go_to_the_library_as_they_are(command, monkeypatch):
    found = {}
    monkeypatch.setattr("qcompress.measure", lambda *given, **named: found.update(named))
    monkeypatch.setattr("qcompress.compress", lambda *given, **named: found.update(named))
    main([*command, "--skip", "0, *.norm*", "--only", "2"])
    assert (found["skip"], found["only"]) == (["0", "*.norm*"], ["2"])


def test_a_group_of_flags_becomes_the_flags_of_a_command():
    @dataclass(frozen=True, kw_only=True)
    class Pair:
        first: int
        second: str = "b"

    @with_flag_groups
    def command(pair: Pair, third: int = 3) -> tuple[Pair, int]:
        return pair, third

    names = inspect.signature(command).parameters
    assert {name: parameter.default for name, parameter in names.items()} == {
        "first": inspect.Parameter.empty, "second": "b", "third": 3,
    }  # fmt: skip
    assert command(first=1, second="x", third=4) == (Pair(first=1, second="x"), 4)


def test_solvers_are_listed_with_their_options(capsys):
    ran(["solvers"])
    shown = capsys.readouterr().out
    for info in available():
        assert info.name in shown
        assert all(f"{name}=" in shown for name in info.options)


def test_solve_passes_seed_options_and_start_on(folder, problem_file, capsys):
    ran(["solve", problem_file, "--solver", "brute-force", "--output", "first.json"])
    words = ["--seed", "5", "--option", "generations=2", "--initial", "first.json", "--output", "second.json"]
    ran(["solve", problem_file, "--solver", "anneal", *words])
    first, second = Solution.load("first.json"), Solution.load("second.json")
    assert (second.solver, second.seed, second.options["generations"]) == ("anneal", 5, 2)
    assert second.objective == first.objective


def test_an_interrupted_solve_writes_the_best_so_far(folder, problem_file, monkeypatch, capsys):
    def interrupt(watch, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(qcompress.cli.progress.Watch, "solved", interrupt)
    ran(["solve", problem_file, "--solver", "brute-force"])
    solution = Solution.load("problem.solution.json")
    assert solution.stop_reason is StopReason.INTERRUPTED
    assert solution.feasible
    assert "stopped: INTERRUPTED" in capsys.readouterr().out


def test_compare_leaves_table_values_and_plot(folder, problem_file, capsys):
    pytest.importorskip("matplotlib")
    words = ["--solver", "brute-force", "--solver", "greedy", "--seeds", "2", "--output", "out"]
    ran(["compare", problem_file, *words])
    comparison = Comparison.load("out/comparison.json")
    assert list(comparison.solutions) == ["brute-force", "greedy"]
    assert comparison.seeds == (0, 1)
    assert (folder / "out/comparison.md").read_text() == comparison.to_markdown()
    assert (folder / "out/anytime.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "OPTIMAL ×2" in shown
    ran(["show", "out/comparison.json"])
    assert capsys.readouterr().out.strip() in shown


def test_compare_takes_several_problems_and_goes_on_from_its_journal(folder, problem_file, capsys):
    layered_problem(4, bits=(2, 4), rank=0).save(folder / "linear.npz")
    words = ["compare", problem_file, "linear.npz", "--solver", "greedy", "--seeds", "2", "--output", "out"]
    words += ["--journal", "runs.jsonl"]
    ran(words)
    assert capsys.readouterr().err.count("linear: greedy seed") == 2
    ran(words)
    out, err = capsys.readouterr()
    assert "greedy seed" not in err
    suite = Suite.load("out/suite.json")
    assert list(suite.comparisons) == ["problem", "linear"]
    assert len((folder / "runs.jsonl").read_text().splitlines()) == 4
    ran(["show", "out/suite.json"])
    assert capsys.readouterr().out.strip() in out


OWN_SOLVERS = """
import dimod

TRIES = dimod.ExactSolver()
"""


def test_compare_takes_options_labels_import_paths_and_a_target(folder, problem_file, capsys):
    (folder / "mine_for_cli.py").write_text(OWN_SOLVERS)
    words = ["compare", problem_file, "--solver", "anneal:sweeps=5", "--solver", "more=anneal:sweeps=9"]
    words += ["--solver", "mine_for_cli:TRIES", "--solvers", "greedy,dp", "--seeds", "1", "--output", "out"]
    ran([*words, "--best-known", "-1", "--target", "problem=1e9", "--within", "0.5%"])
    compared = Comparison.load("out/comparison.json")
    assert list(compared.solutions) == ["anneal(sweeps=5)", "more", "ExactSolver", "greedy"]
    assert "dp" in compared.skipped
    assert (compared.best_known, compared.stated_target, compared.within) == (-1.0, 1e9, 0.005)
    assert "Best objective" in capsys.readouterr().out
    ran([*words, "--csv"])
    printed = capsys.readouterr().out
    assert printed == (folder / "out/runs.csv").read_text()
    assert len(printed.splitlines()) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--solver", "a=dp", "--solver", "a=milp"], "labels must differ"),
        (["--solver", "dp", "--within", "much"], "--within must be a share"),
        (["--solver", "dp", "--best-known", "a lot"], "must be a number"),
        (["--solver", "dp", "--target", "other=1"], "no problem is called 'other'; the problems are problem"),
        (["--solver", "dp", "--json", "--csv"], "give one of them"),
        (["--solver", "nowhere_at_all:it"], "no module is called 'nowhere_at_all'"),
    ],
)
def test_compare_refuses_what_it_cannot_mean(words, message, folder, problem_file, capsys):
    assert main(["compare", problem_file, "--seeds", "1", *words]) in (1, 2)
    assert message in capsys.readouterr().err


def test_sweep_leaves_curve_and_plot_and_goes_on_from_its_journal(folder, problem_file, capsys):
    pytest.importorskip("matplotlib")
    words = ["sweep", problem_file, "--resource", "bytes", "--points", "4", "--journal", "points.jsonl"]
    ran([*words, "--plot", "curve.png"])
    out, err = capsys.readouterr()
    assert err.count("bytes ") == out.count("OPTIMAL") == 4
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    curve = Sweep.load("problem.sweep.json")
    assert len(curve.points) == 4
    ran(["show", "problem.sweep.json"])
    assert capsys.readouterr().out == out
    ran([*words, "--json"])
    out, err = capsys.readouterr()
    assert "OPTIMAL" not in err
    assert json.loads(out) == json.loads((folder / "problem.sweep.json").read_text())
    budgets = f"{curve.points[1].budget},{curve.points[2].budget}"
    ran(["sweep", problem_file, "--budgets", budgets, "--solver", "anneal", "--option", "sweeps=9", "-o", "two.json"])
    two = Sweep.load("two.json")
    assert [point.budget for point in two.points] == [curve.points[1].budget, curve.points[2].budget]
    assert (two.solver, two.points[0].solution.options["sweeps"]) == ("anneal", 9)


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


def test_show_reads_reports_cut_runs_and_folders_of_comparisons(folder, problem_file, monkeypatch, capsys):
    def cut(*given, **named):
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["qcompress.steps.choosing"], "solve", cut)
        assert main([*COMPRESS, "--output", "run"]) == 1
    capsys.readouterr()
    ran(["show", "run"])
    lines = capsys.readouterr().out
    assert "the same command resumes it" in lines
    assert re.search(r"measure +[\d.]+ s +done", lines)
    assert re.search(r"solve +[\d.]+ s +not finished", lines)
    ran([*COMPRESS, "--output", "run"])
    told = capsys.readouterr().out
    for shown in ("run", "run/report.json"):
        ran(["show", shown])
        assert capsys.readouterr().out == told
    ran(["compare", problem_file, "--solver", "greedy", "--seeds", "1", "--output", "compared"])
    told = capsys.readouterr().out
    ran(["show", "compared"])
    assert capsys.readouterr().out == told
    (folder / "else").mkdir()
    assert main(["show", "else"]) == 1
    assert "else is not a folder written by 'compress' or 'compare'; it contains nothing" in capsys.readouterr().err


def test_compress_keeps_the_measurement_for_another_budget_or_solver(folder, capsys):
    ran([*COMPRESS, "--output", "run"])
    measured = (folder / "run/measurement.npz").stat().st_mtime_ns
    capsys.readouterr()
    ran([*COMPRESS, "--budget", "macs=1", "--solver", "lagrangian", "--output", "run", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (set(report["budgets"]), report["solver"]) == ({"bytes", "macs"}, "lagrangian")
    assert (folder / "run/measurement.npz").stat().st_mtime_ns == measured


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
    assert second["reused from an earlier run"] == {"measurement.npz"}
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


TUNED = ["compress", *MEASURE[1:3], "--no-guard", "--no-prune-quantize", "--ranks", "2,4", "--factor-bits", "3,4"]
TUNED += [
    "--budget",
    "bytes=0.5",
    "--solver",
    "brute-force",
    "--finetune-steps",
    "20",
    "--learning-rate",
    "3e-3",
]


def nats(file):
    """The mean KL divergence of the original's softmax to a file's model over the batches, by the book."""
    import zoo_for_cli

    inputs = torch.cat(zoo_for_cli.batches())
    with torch.no_grad():
        p, q = (own(inputs).double().softmax(1) for own in (zoo_for_cli.network(), loaded(file)))
    return float((p * (p / q).log()).sum(1).mean())


def loaded(file):
    import zoo_for_cli

    return load_compressed(file, zoo_for_cli.network)


def payload(file):
    return sum(array.nbytes for array in safetensors.numpy.load_file(file).values())


def test_compress_fine_tunes_in_the_same_bytes_and_once(folder, monkeypatch, capsys):
    ran([*TUNED, "--output", "run", "--json"])
    report = json.loads(capsys.readouterr().out)
    ran(["apply", "zoo_for_cli:network", "run/measurement.npz", "run/solution.json", "--output", "before.safetensors"])
    before, after = "before.safetensors", "run/model.safetensors"
    assert report["loss_measured"] == pytest.approx(nats(before), rel=1e-6)
    assert report["loss_finetuned"] == pytest.approx(nats(after), rel=1e-6)
    assert report["loss_finetuned"] < report["loss_measured"]
    assert all("rank" in part["option"] for part in report["parts"][:2])
    assert [part["option"] for part in report["parts"]] == [own.transform.label for own in stored_parts(after)]
    assert payload(after) == payload(before) == report["usage"]["bytes"] <= report["budgets"]["bytes"]
    assert [own.transform for own in stored_parts(after)] == [own.transform.nearest for own in stored_parts(before)]
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


# --- mistakes ------------------------------------------------------------------------------------------------------

USAGE, FAILURE = 2, 1
MISTAKES = [
    (["sovle"], USAGE, "sovle"),
    (["solve"], USAGE, "Missing argument 'PROBLEM'"),
    (["solve", "problem.npz", "--sovler", "x"], USAGE, "--sovler"),
    (["solve", "problem.npz", "--seed", "x"], USAGE, "Invalid value for '--seed'"),
    (["solve", "nowhere.npz"], FAILURE, "nowhere.npz"),
    (["solve", "zoo_for_cli.py"], FAILURE, "zoo_for_cli.py is not a qcompress problem file"),
    (["solve", "problem.npz", "--solver", "nobody"], FAILURE, "no solver is called 'nobody'; known: auto"),
    (["solve", "problem.npz", "--time-limit", "0"], FAILURE, "time_limit must be a positive number"),
    (["solve", "problem.npz", "--option", "sweeps"], USAGE, "--option must be written name=value, found 'sweeps'"),
    (["solve", "problem.npz", "--option", "nothing=1"], FAILURE, "has no option 'nothing'"),
    (["solve", "impossible.npz"], FAILURE, "bytes: asked for at most 1, the smallest possible use is"),
    (["compare", "problem.npz", "--solver", "nobody"], FAILURE, "no solver is called 'nobody'"),
    (["compare", "problem.npz", "--seeds", "0"], USAGE, "--seeds"),
    (["compare", "problem.npz", "problem.npz"], USAGE, "must have different names"),
    (["sweep", "problem.npz", "--resource", "seconds"], FAILURE, "no resource 'seconds'; it has: bytes"),
    (["sweep", "problem.npz", "--budgets", "1,2"], FAILURE, "asked for at most 1"),
    (["formulate", "problem.npz", "--budget", "bytes=0.5"], FAILURE, "is not a qcompress measurement file"),
    (["formulate", "m.npz"], USAGE, "--budget"),
    (["formulate", "m.npz", "--budget", "bytes"], USAGE, "--budget must be written name=value, found 'bytes'"),
    (
        ["formulate", "m.npz", "--budget", "bytes=half"],
        USAGE,
        "--budget: the budget for bytes must be a positive number",
    ),
    (["formulate", "m.npz", "--budget", "bytes=1", "--budget", "bytes=2"], USAGE, "gives 'bytes' twice"),
    (["measure", "zoo_for_cli", "zoo_for_cli:batches"], USAGE, "must be written package.module:callable"),
    (["measure", "no_zoo:network", "zoo_for_cli:batches"], USAGE, "no module is called 'no_zoo'"),
    (
        ["measure", "zoo_for_cli:net", "zoo_for_cli:batches"],
        USAGE,
        "has no 'net'; it has: torch, nn, NUMBER, calls, network",
    ),
    (["measure", "zoo_for_cli:NUMBER", "zoo_for_cli:batches"], USAGE, "is of type int; name a function"),
    (
        ["measure", "zoo_for_cli:breaks", "zoo_for_cli:batches"],
        FAILURE,
        "RuntimeError: the model's own error, in two lines",
    ),
    (["measure", "zoo_for_cli:network", "zoo_for_cli:once"], FAILURE, "data is read more than once"),
    ([*MEASURE, "--method", "guess"], FAILURE, "method must be one of fisher, direct, sampled, found 'guess'"),
    (
        [*MEASURE[:3], "--bits", "2,four"],
        USAGE,
        "--bits must be numbers separated by commas, such as 2,4,8; found 'four'",
    ),
    ([*MEASURE[:3], "--bits", "1"], USAGE, "bits must be a whole number from 2 to 16, found 1"),
    ([*MEASURE[:3], "--ranks", "8,0"], USAGE, "a rank must be a whole number from 1, found 0"),
    ([*MEASURE[:3], "--energies", "90"], USAGE, "the energy must be a number above 0 and below 1, found 90"),
    ([*MEASURE[:3], "--kinds", "tuker"], USAGE, "must be one of channels, spatial, tucker, sliced; found 'tuker'"),
    ([*MEASURE[:3], "--slices", "2"], USAGE, "--slices needs the kind sliced, for example --kinds sliced --slices 2,4"),
    ([*MEASURE[:3], "--factor-sparsity", "0.5"], USAGE, "--factor-sparsity needs --factor-bits"),
    ([*MEASURE[:3], "--channels", "--bits", "4"], USAGE, "channel removal cannot be combined with other options"),
    ([*MEASURE, "--no-prune-quantize"], USAGE, "--bits has no effect with --no-prune-quantize"),
    ([*COMPRESS[:3], "--budget", "bytes=0.5", "--no-prune-quantize"], USAGE, "no compression options enabled"),
    (
        [*MEASURE[:3], "--no-prune-quantize", "--low-rank", "--compensated"],
        USAGE,
        "--compensated has no effect with --no-prune-quantize",
    ),
    ([*COMPRESS[:-4], "--budget", "bytes=0.01"], FAILURE, "the smallest possible use is"),
    ([*COMPRESS[:-4], "--budget", "watts=0.5"], FAILURE, "no resource is called 'watts'; measured are: bytes, macs"),
    (
        [*COMPRESS, "--learning-rate", "1e-3"],
        USAGE,
        "--learning-rate needs --finetune-steps, for example --finetune-steps 1000",
    ),
    ([*COMPRESS, "--finetune-steps", "-1"], USAGE, "--finetune-steps"),
    ([*TUNED, "--learning-rate", "0"], FAILURE, "a learning rate above 0, found steps=20, patience=1, learning_rate=0"),
    (["finetune", *MEASURE[1:3], "nowhere.safetensors"], FAILURE, "nowhere.safetensors"),
    (["finetune", *MEASURE[1:3], "bad.safetensors"], FAILURE, "bad.safetensors is not a complete"),
    (["show", "nowhere"], FAILURE, "nowhere"),
    (["show", "zoo_for_cli.py"], FAILURE, "not a qcompress file"),
    (["show", "other.json"], FAILURE, "has a kind that 'show' does not know: 'something'"),
    (["show", "bad.safetensors"], FAILURE, "bad.safetensors is not a complete"),
    (["apply", "zoo_for_cli:network", "problem.npz", "x.json"], FAILURE, "is not a qcompress measurement file"),
]


@pytest.mark.parametrize(("words", "code", "message"), MISTAKES, ids=[" ".join(words)[:60] for words, _, _ in MISTAKES])
def test_a_mistake_is_one_line_on_stderr(words, code, message, folder, problem_file, capsys):
    problem = Problem.load(problem_file)
    problem.with_budgets(bytes=1).save(folder / "impossible.npz")
    (folder / "other.json").write_text('{"kind": "something"}')
    (folder / "bad.safetensors").write_bytes(b"not at all")
    before = set(folder.iterdir())
    assert main(words) == code
    captured = capsys.readouterr()
    assert captured.out == "" or "no choice meets the budget" in captured.err  # then stdout says why
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    assert message in captured.err, captured.err
    left = {path.name for path in set(folder.iterdir()) - before} - {"__pycache__", "runs"}
    assert left == set()


def test_the_module_ends_with_the_commands_code(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["qcompress", "solve", "nowhere.npz"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("qcompress", run_name="__main__")
    assert ended.value.code == FAILURE


def test_debug_shows_where(folder):
    with pytest.raises(RuntimeError, match="the model's own error"):
        main(["measure", "zoo_for_cli:breaks", "zoo_for_cli:batches", "--debug"])


def test_a_problem_without_an_answer_is_an_error_but_leaves_the_solution(folder, capsys):
    uses = {"bytes": [8, 4, 8, 4], "seconds": [1, 3, 1, 3]}
    problem = Problem(["a", "b"], [["x", "y"]] * 2, [0, 1, 0, 1], uses, {"bytes": 8, "seconds": 2})
    problem.save("p.npz")
    assert main(["solve", "p.npz", "--solver", "brute-force"]) == 1
    assert "found no choice within the budgets (INFEASIBLE)" in capsys.readouterr().err
    assert Solution.load("p.solution.json").choice is None
    assert main(["compare", "p.npz", "--solver", "brute-force"]) == 1
    assert "no solver found a choice" in capsys.readouterr().err


def test_ctrl_c_outside_the_solver_is_one_line(monkeypatch, capsys):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompress.demo.run_demo", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


# --- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "value"),
    [("a=1", 1), ("a=1_000", 1000), ("a=0.5", 0.5), ("a=1e-3", 1e-3), ("a=True", True), ("a=None", None),
     ("a=cbc", "cbc"), ("a='2'", "2"), ("a=b=c", "b=c"), ("a=[1]", "[1]"), ("a=-3", -3)],
)  # fmt: skip
def test_values_are_numbers_truths_none_or_words(word, value):
    assert arguments.assignments([word], "--option") == {"a": value}


# --- engines -------------------------------------------------------------------------------------------------------


def test_engines_are_listed(capsys):
    ran(["engines", "--json"])
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed["llama.cpp"]["available"]
    ran(["engines"])
    assert "GGUF" in capsys.readouterr().out


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


def test_layers_are_left_out_by_name(folder, capsys):
    words = ["measure", "zoo_for_cli:network", "zoo_for_cli:batches", "--bits", "4", "--json", "--skip"]
    assert main([*words, "0,nothing*"]) != 0
    assert "no layer has a name like 'nothing*'; there are: 0, " in capsys.readouterr().err
    ran([*words, "0"])
    assert json.loads(capsys.readouterr().out)["skipped"]["0"] == "left out by skip='0'"
