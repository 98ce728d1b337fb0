"""Checks for extensions of qcompress: that a transform meets its contract and an engine's files match predictions.

    from qcompress.testing import check_engine, check_transform
    check_transform(MyTransform(bits=1))
    check_engine(MyEngine(), network, [torch.randn(8, 16)])

Everything random is drawn from fixed seeds.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from formulations.files import AnyPath
from qcompress.budgets import FILE_BYTES
from qcompress.compressed.apply import apply
from qcompress.compressed.file import load_compressed, save_compressed
from qcompress.compression import compress
from qcompress.engines.base import Engine
from qcompress.engines.export import export
from qcompress.engines.legal import for_engine
from qcompress.engines.verify import verify
from qcompress.errors import EngineError, QcompressError
from qcompress.formulation import formulate
from qcompress.measuring.measure import measure
from qcompress.options import Options, transform_from_json
from qcompress.transforms.base import Target, Transform, Weight
from solvers import solve

SHAPES = ((1, 1), (1, 7), (3, 8), (12, 1), (16, 27), (33, 64))
"""Channels and weights per channel: single, odd, and not a multiple of eight."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHARES = (0.0, 0.3, 0.7, 1.0)
"""Budgets, as positions between the smallest and the largest file of an engine."""


class CheckError(QcompressError, AssertionError):
    """A transform or an engine violates its contract."""


def check_transform(transform: Transform) -> None:
    """Check a transform on weights of many shapes, then in a model that is measured, compressed, saved and loaded.

    The model is loaded in this process and in a new one. The decoded weights are not compared with the original ones: a
    transform may lose as much as it likes.

    Args:
        transform: transform registered in `qcompress.options` or as an entry point, so that files can name it.

    Raises:
        CheckError: the transform violates the contract of `qcompress.transforms.base`; the message says how and on
            which weight.

    >>> from qcompress.transforms.quantize.prune_quantize import PruneQuantize
    >>> check_transform(PruneQuantize(bits=4, sparsity=0.5))
    """
    label = transform.label
    if transform_from_json(transform.to_json()) != transform:
        raise CheckError(f"{label!r} is not the same after transform_from_json(transform.to_json())")
    fitting = [weight for weight in _weights() if not transform.why_not(weight.target)]
    if not fitting:
        raise CheckError(f"{label!r} fits none of the weights of shapes {SHAPES}: why_not refuses all of them")
    for weight in fitting:
        _check_weight(transform, weight)
    _check_in_a_model(transform)


def check_engine(engine: Engine, make_model: Callable[[], nn.Module], data: Sequence[object]) -> None:
    """Check that an engine's files have the predicted sizes and outputs, at several budgets.

    Args:
        engine: engine as it would be passed to ``compress(target=…)``.
        make_model: function that returns a model supported by the engine, the same one every time.
        data: batches for the model.

    Raises:
        CheckError: a file differs from its prediction; the message says how.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = (Path(folder) / str(number) for number in itertools.count())
        whole = next(files)
        export(make_model(), whole, target=engine, example=data[0])
        seen = verify(whole, make_model(), data, target=engine)
        if not seen.ok:
            raise CheckError(f"engine {engine.name!r}: the file of the original model is wrong: {seen.why_not}")
        largest, smallest = seen.size_bytes, _smallest_file(engine, make_model(), data)
        for share in SHARES:
            budget = smallest + share * (largest - smallest)
            try:
                compress(
                    make_model(), data, budget={"file_bytes": budget}, target=engine, output=next(files), guard=False
                )
            except EngineError as error:
                raise CheckError(f"engine {engine.name!r}, at most {budget:,.0f} bytes: {error}") from error


def _smallest_file(engine: Engine, model: nn.Module, data: Sequence[object]) -> float:
    """Return the bytes of the smallest file that the engine's options allow."""
    legal = for_engine(engine, model, measure(model, data, engine.options()), data[0])
    return formulate(legal, {FILE_BYTES: 1.0}, pairs=False).minimum_usage()[FILE_BYTES]


def _weights() -> Iterator[Weight]:
    """Yield weights of every shape and type, random and zero, with the statistics from calibration."""
    generator = torch.Generator().manual_seed(0)
    for (channels, per_channel), dtype in itertools.product(SHAPES, DTYPES):
        rows = torch.randn(channels, per_channel, generator=generator).to(dtype)
        inputs = torch.randn(4 * per_channel, per_channel, generator=generator)
        target = Target(
            layer="Linear",
            channels=channels,
            per_channel=per_channel,
            dtype=dtype,
            macs=float(channels * per_channel),
            common_input=True,
        )
        moments = inputs.T @ inputs / len(inputs)
        for values in (rows, torch.zeros_like(rows)):
            yield Weight(values, target, moments, len(inputs), moments.diagonal())


def _check_weight(transform: Transform, weight: Weight) -> None:
    target, before = weight.target, weight.rows.clone()
    where = f"{transform.label!r} of a weight {target.channels} × {target.per_channel} in {target.dtype}"
    stored = transform.encode(weight)
    size_bytes = sum(array.nbytes for array in stored.values())
    if size_bytes != transform.size_bytes(target):
        raise CheckError(f"{where}: encode gives {size_bytes} bytes, size_bytes says {transform.size_bytes(target)}")
    rows, expected = transform.decode(stored, target), transform.approximate(weight)
    if rows.shape != weight.rows.shape or rows.dtype != target.dtype:
        raise CheckError(f"{where}: decode gives {tuple(rows.shape)} in {rows.dtype}")
    if not _same(rows, expected):
        raise CheckError(f"{where}: decode(encode(weight)) is not approximate(weight), bit for bit")
    if not bool(torch.isfinite(rows).all()):
        raise CheckError(f"{where}: decode gives numbers that are not finite")
    if not _same(weight.rows, before):
        raise CheckError(f"{where}: encode changed the weight")


def _check_in_a_model(transform: Transform) -> None:
    """Measure, choose the transform wherever it fits, save and load: weights and outputs must be the same."""
    batch = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    model = _network()
    measurement = measure(model, [batch], Options((transform,)))
    if all(len(options) == 1 for options in measurement.transforms):
        raise CheckError(f"{transform.label!r} is an option of no layer of a small network")
    problem = formulate(measurement, {"bytes": 1.0}, pairs=False)
    smallest = problem.minimum_usage()["bytes"]
    solution = solve(problem.with_budgets(bytes=smallest), "lagrangian")
    smaller = apply(model, measurement, solution)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_compressed(smaller, file)
        loaded = load_compressed(file, _network)
        _check_in_a_new_process(transform, file, smaller)
    with torch.no_grad():
        if not torch.equal(loaded(batch), smaller(batch)):
            raise CheckError(f"{transform.label!r}: a model that was saved and loaded gives other outputs")


def _network() -> nn.Module:
    """Return a small network with a convolution and two linear layers, the same one every time."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 10)
        ).eval()


def _check_in_a_new_process(transform: Transform, file: Path, smaller: nn.Module) -> None:
    """Load the file where nothing was encoded: decoding may only depend on what the file holds."""
    weights = file.with_name("weights.safetensors")
    code = "import sys; from qcompress.testing import write_weights; write_weights(*sys.argv[1:])"
    child = subprocess.run(  # noqa: S603  (our own code, no shell)
        [sys.executable, "-c", code, file, weights, str(torch.get_num_threads())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    where = f"{transform.label!r}: decode depends on more than the arrays of encode and the target:"
    if child.returncode:
        why = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise CheckError(f"{where} a model that was saved cannot be loaded in a new process ({why})")
    decoded = safetensors.torch.load_file(weights)
    if wrong := [name for name, tensor in smaller.state_dict().items() if not _same(decoded[name], tensor)]:
        raise CheckError(f"{where} in a new process, {wrong[0]!r} is loaded with other values")


def write_weights(file: AnyPath, weights: AnyPath, threads: str) -> None:
    """Load the small network of `check_transform` from a file and write its weights; run in a new process."""
    torch.set_num_threads(int(threads))
    loaded = load_compressed(file, _network)
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in loaded.state_dict().items()}, weights)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
