"""A mistake is one clear line on stderr, and leaves nothing behind."""

import pytest

from formulations import Problem
from qcompress.cli import main
from tests.cli.zoo import COMPRESS, MEASURE, TUNED

USAGE, FAILURE = 2, 1


MISTAKES = [
    (["show", ""], USAGE, "an argument or the value of an option is empty"),
    ([*COMPRESS, "--output", ""], USAGE, "an argument or the value of an option is empty"),
    ([*COMPRESS, "--output="], USAGE, "an argument or the value of an option is empty"),
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
    (["instances", "list", "."], FAILURE, "is not a library of instances: it has no records.json"),
    (["compare", "problem.npz", "--solver", "nobody"], FAILURE, "no solver is called 'nobody'"),
    (["compare", "problem.npz", "--seeds", "0"], USAGE, "--seeds"),
    (["compare", "problem.npz", "problem.npz"], USAGE, "must have different names"),
    (["sweep", "problem.npz", "--resource", "seconds"], FAILURE, "no resource 'seconds'; it has: bytes"),
    (["sweep", "problem.npz", "--budgets", "1,2"], FAILURE, "asked for at most 1"),
    (["formulate", "problem.npz", "--budget", "bytes=0.5"], FAILURE, "is not a qcompress measurement file"),
    (["formulate", "m.npz"], USAGE, "--budget"),
    (["show", "zoo_for_cli.py"], FAILURE, "zoo_for_cli.py is not a file of qcompress, or is damaged; 'show' reads"),
    (["solve", "problem.npz", "--time-limit", "x"], USAGE, "number. Try 'qcompress solve --help'."),
    (
        [*COMPRESS[:-4], "--budget", "bytes=0.5", "--budget", "macs=90%"],
        FAILURE,
        "; no enabled option lowers macs: fewer bits do not, low-rank factors",
    ),
    (["formulate", "m.npz", "--budget", "bytes"], USAGE, "--budget must be written name=value, found 'bytes'"),
    (
        ["formulate", "m.npz", "--budget", "bytes=half"],
        USAGE,
        "Invalid value: the budget for bytes must be a positive number",
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
    ([*MEASURE[:3], "--channels", "--bits", "4", "--no-prune-quantize"], USAGE, "--bits has no effect with"),
    ([*MEASURE[:3], "--channels", "--ranks", "4", "--slices", "2"], USAGE, "--slices needs the kind sliced"),
    (
        [*MEASURE[:3], "--channels", "--no-compensated"],
        USAGE,
        "--compensated needs --bits, --sparsity or --factor-bits",
    ),
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
    (["show", "other.json"], FAILURE, "is a file of the kind 'something'; 'show' reads"),
    (["show", "bad.safetensors"], FAILURE, "bad.safetensors is not a complete"),
    (
        ["export", "zoo_for_cli:network", "x.safetensors", "zoo_for_cli:batches", "--target", "onnxruntime"],
        USAGE,
        "(zoo_for_cli:batches): package.module:callable is given with --data. Try",
    ),
    (
        ["apply", "zoo_for_cli:network", "m.npz", "x.json", "zoo_for_cli:batches"],
        USAGE,
        "is given with --batch-norm or --forward. Try",
    ),
    (["export", "zoo_for_cli:network", "x.safetensors", "x.onnx", "--target", "x"], USAGE, "(x.onnx). Try"),
    (["solve", "problem.npz", "zoo_for_cli:batches"], USAGE, "(zoo_for_cli:batches). Try"),
    ([*COMPRESS, "--output", "zoo_for_cli.py"], FAILURE, "folder zoo_for_cli.py: zoo_for_cli.py is a file; name a"),
    ([*COMPRESS, "--output", "zoo_for_cli.py/in"], FAILURE, "run folder zoo_for_cli.py/in: zoo_for_cli.py is a file;"),
    (["compare", "problem.npz", "--output", "zoo_for_cli.py"], USAGE, "'zoo_for_cli.py' is a file: name a folder"),
    (["compare", "problem.npz", "--output", "zoo_for_cli.py/in"], USAGE, "'zoo_for_cli.py' is a file: name a folder"),
    (
        ["leap", "submit", "problem.npz", "--solver", "leap-cqm", "--jobs", "zoo_for_cli.py"],
        USAGE,
        "'zoo_for_cli.py' is a file: name a folder",
    ),
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
    assert captured.out == ""
    *reason, line = captured.err.splitlines()
    assert not reason or "no choice meets the budget" in line, captured.err  # then why stands above
    assert line.startswith("error: ")
    assert message in line, captured.err
    left = {path.name for path in set(folder.iterdir()) - before} - {"__pycache__", "runs"}
    assert left == set()
