"""`verify`: compare an engine's file with the model it was written from, by running both on samples."""

import copy
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formulations.files import AnyPath
from qcompress.compressed.factored import fold_
from qcompress.compressed.record import detach, record_of
from qcompress.engines.base import Engine, EngineRun
from qcompress.engines.export import HasModel, model_of, other_kind, size_on_disk
from qcompress.engines.registry import as_engine
from qcompress.engines.rounding import rounded_differently
from qcompress.errors import BatchError, DataError, EngineError, ModelError
from qcompress.model import forward as forwards
from qcompress.model.composed import composed
from qcompress.model.modes import outside_modes
from qcompress.model.opened import opened_of
from qcompress.scalars import as_flag

BY_ITSELF = (
    "An engine runs model(batch), without forward=: give batches that the model takes, or a module around it that "
    "takes them and returns one tensor"
)
ROWS = 64
"""Number of rows of outputs that are compared at once: those of a large vocabulary take much memory."""
RESOLUTION = torch.finfo(torch.float32).eps ** 2
"""Squared spread of outputs, relative to their squares, that is no more than their rounding."""
LOWEST = forwards.RULED_OUT / 2
"""Outputs below are scores of excluded classes, which engines give as minus infinity or any number that far away."""
CHAOTIC = 1.5
"""Largest difference of outputs, relative to the difference by rounding alone, of a model that amplifies rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Comparison of an engine's file with the emulation that the choice was based on.

    Attributes:
        size_bytes: bytes of the file.
        max_difference: largest difference between the engine's outputs and the emulation's; excluded classes (minus
            infinity) do not differ if both exclude them, else infinitely.
        kl: mean KL divergence from the emulation's outputs to the engine's, nats per sample, over the last dimension.
        agreement: share of outputs with the same largest entry.
        by_rounding: root mean square by which the emulation's outputs change, relative to their spread, if every layer
            is only rounded differently; None if the engine's outputs agree without this allowance. Outputs spread over
            their last dimension, or over all of them if it holds one number.
        speedup: time of the same model with dense weights divided by that of the file, both in the engine; not-a-number
            for an opened model, whose time is dominated by reading, and where it could not be compared.
        peak_bytes, dense_peak_bytes: peak memory of loading the file and running a batch in a separate process, and the
            same with dense weights; None if the engine does not measure it.
        ok: whether no problem was found.
        why_not: the problem: bytes that differ from the prediction, weights or outputs from the emulation.
        not_compared: what could not be compared with these batches, or here, and why: no fault of the file.
    """

    size_bytes: int
    max_difference: float
    kl: float
    agreement: float
    speedup: float
    ok: bool
    why_not: str
    by_rounding: float | None = None
    peak_bytes: int | None = None
    dense_peak_bytes: int | None = None
    not_compared: str = ""


@outside_modes
def verify(
    path: AnyPath,
    model_or_result: nn.Module | HasModel,
    data: Iterable[Any],
    *,
    target: str | Engine,
    memory: bool = True,
) -> Verification:
    """Run an engine's file on samples and compare it with the model that it was written from.

    Args:
        path: the file or folder that `export` wrote.
        model_or_result: the model or result that was exported.
        data: batches; a few samples are enough.
        target: same as in `export`.
        memory: whether to measure the peak memory of both, in separate processes.

    Raises:
        EngineError: the engine is unknown, does not run the file, or writes folders instead; or the file gives outputs
            of other shapes than the model.
        DataError: there is no batch.
        MissingError: a package of the engine is missing.
        FileNotFoundError: there is no such file.
    """
    engine, model, file, memory = as_engine(target), model_of(model_or_result), Path(path), as_flag(memory, "memory")
    if not file.exists():
        raise FileNotFoundError(2, "there is no such file", str(file))
    if why := other_kind(engine, file):
        raise EngineError(f"{why}; give what export wrote for this engine")
    batches = list(forwards.checked_data(data))
    if not batches:
        raise DataError("the data is empty, so there is nothing to verify with: give at least one batch")
    size_bytes, difference, wrong, unknown = checked(engine, file, model, batches)
    faster = math.nan
    peaks: list[int | None] = [None, None]
    if opened_of(model) is None and not unknown:
        try:
            faster, peaks = _against_dense(engine, model, file, batches, memory=memory)
        except (EngineError, OSError) as error:  # of the dense model's file: this one has run
            unknown = f"its time with that of dense weights, whose file is written to {tempfile.gettempdir()}: {error}"
    return Verification(
        size_bytes=size_bytes,
        max_difference=difference.largest,
        kl=difference.kl,
        agreement=difference.agreement,
        speedup=faster,
        ok=not wrong,
        why_not=wrong,
        by_rounding=difference.by_rounding,
        peak_bytes=peaks[0],
        dense_peak_bytes=peaks[1],
        not_compared=unknown,
    )


def checked(engine: Engine, file: Path, model: nn.Module, batches: Sequence[Any]) -> tuple[int, "Difference", str, str]:
    """Return the file's bytes, its difference from the emulation, what is wrong with it, and what is not compared.

    Outputs may differ by the engine's tolerance or, if the model amplifies rounding errors, by less than `CHAOTIC`
    times what rounding alone does to them.
    """
    expected = emulated(engine, model, batches)
    run = engine.run_by_block(file, batches) if opened_of(model) is not None else engine.run(file, batches)
    _require_same_shapes(file, run, expected)
    found, size_bytes, wrong, unknown = compared(run, expected), size_on_disk(file), engine.check(file, model), ""
    try:
        predicted = _predicted_bytes(engine, model, engine.example_of(file, batches[0]))
    except BatchError as error:
        predicted, unknown = size_bytes, f"its bytes and its time with those predicted: {error}"
    if size_bytes != predicted:
        wrong = f"the file takes {size_bytes:,} bytes instead of the predicted {predicted:,}"
    elif not wrong and not found.relative <= engine.tolerance:
        with rounded_differently(model, seed=0):
            found = replace(found, by_rounding=compared(emulated(engine, model, batches), expected).relative)
        if not found.relative < CHAOTIC * (found.by_rounding or 0.0):
            wrong = (
                f"its outputs differ from the emulation's by {found.relative:.2%} of their spread, "
                f"at most {engine.tolerance:.2%} is expected, and rounding alone makes {found.by_rounding:.2%}"
            )
    return size_bytes, found, wrong, unknown


def _require_same_shapes(file: Path, run: EngineRun, expected: EngineRun) -> None:
    """Raise an error if the file gives outputs of other shapes than the model.

    Raises:
        EngineError: it does, as the file of another model.
    """
    for found, wanted in zip(run.outputs, expected.outputs, strict=True):
        if found.shape != wanted.shape:
            raise EngineError(
                f"{file} is the file of another model: its outputs have the shape {list(found.shape)}, those of "
                f"the given model {list(wanted.shape)}; give the model or result that it was written from"
            )


def emulated(engine: Engine, model: nn.Module, batches: Sequence[Any]) -> EngineRun:
    """Compute what the engine is expected to give.

    Raises:
        EngineError: the model does not take the batches or give one tensor by itself, without ``forward=``.
        DataError: the engine does not take the batches.
    """
    try:
        with forwards.evaluating(model), forwards.first_pass(batches[0]):
            return engine.emulate(model, batches)
    except ModelError as error:  # its advice, forward=, is for PyTorch only
        raise EngineError(f"engine {engine.name!r}: {str(error).partition(';')[0]}. {BY_ITSELF}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Difference between outputs, see `Verification`; ``relative`` is the root mean square over the expected spread."""

    largest: float
    relative: float
    kl: float
    agreement: float
    by_rounding: float | None = None


def compared(run: EngineRun, expected: EngineRun) -> Difference:
    """Compare the outputs ``(…, numbers)`` of two runs, without classes that both exclude.

    >>> same = EngineRun(outputs=(torch.eye(3),), wall_s=1.0)
    >>> compared(same, same)
    Difference(largest=0.0, relative=0.0, kl=0.0, agreement=1.0, by_rounding=None)
    """
    figures = [
        _differing(*(rows.detach().cpu().double() for rows in pair))
        for outputs in zip(run.outputs, expected.outputs, strict=True)
        for pair in zip(*(torch.split(output.reshape(-1, output.shape[-1]), ROWS) for output in outputs), strict=True)
    ]
    largest, off, spread, size, kl, same, rows = torch.tensor(figures, dtype=torch.float64).T
    count, extent = float(rows.sum()), float(spread.sum())
    if extent <= RESOLUTION * float(size.sum()):
        extent = _whole_extent(expected)
    relative = math.sqrt(float(off.sum()) / extent) if extent else math.inf if off.any() else 0.0
    return Difference(
        largest=float(largest.max()),
        relative=relative,
        kl=float(kl.sum()) / count,
        agreement=float(same.sum()) / count,
    )


def _whole_extent(expected: EngineRun) -> float:
    """Return the squared spread of all outputs, or of their difference from 0 if they are one number."""
    numbers = torch.cat([output.detach().cpu().double().reshape(-1) for output in expected.outputs])
    numbers = numbers[numbers > LOWEST]
    spread, size = float((numbers - numbers.mean()).square().sum()), float(numbers.square().sum())
    return spread if spread > RESOLUTION * size else size


def _differing(actual: Tensor, wanted: Tensor) -> tuple[float, ...]:
    """Return the largest difference of ``(rows, numbers)``, and sums (squared differences, spread, KL, answers)."""
    excluded = wanted <= LOWEST
    off = (actual - wanted).where(~excluded, 0.0).where(excluded == (actual <= LOWEST), math.inf)
    numbers, count = wanted.where(~excluded, 0.0), (~excluded).sum(-1, keepdim=True).clamp(min=1)
    spread = (numbers - numbers.sum(-1, keepdim=True) / count).where(~excluded, 0.0)
    log_p, log_q = (scores.clamp(min=forwards.RULED_OUT).log_softmax(-1) for scores in (wanted, actual))
    return (
        float(off.abs().max()),
        float(off.square().sum()),
        float(spread.square().sum()),
        float(numbers.square().sum()),
        float((log_p.exp() * (log_p - log_q)).sum()),
        float((actual.argmax(-1) == wanted.argmax(-1)).sum()),
        float(len(wanted)),
    )


def _predicted_bytes(engine: Engine, model: nn.Module, example: Any) -> int:
    record = record_of(model)
    parts = () if record is None else tuple(item.part for item in record.parts)
    transforms = () if record is None else tuple((item.transform,) for item in record.parts)
    return engine.sizes(model, parts, transforms, example).of([0] * len(parts))


def speedup_of(engine: Engine, original: nn.Module, smaller: nn.Module, batches: Sequence[Any]) -> float:
    """Return the ratio of the times of two models in the engine, measured in turn."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "original", Path(folder) / "smaller"]
        for file, model in zip(files, (original, smaller), strict=True):
            engine.write(model, file, batches[0])
        before_s, after_s = engine.seconds(files, batches)
    return before_s / after_s


def _against_dense(
    engine: Engine, model: nn.Module, file: Path, batches: Sequence[Any], *, memory: bool
) -> tuple[float, list[int | None]]:
    """Return the speed-up of the file over the model with dense weights in the engine, and the peak memory of both."""
    with composed(model):
        dense = fold_(copy.deepcopy(model))
    detach(dense)
    with tempfile.TemporaryDirectory() as folder:
        files = [file, Path(folder) / "dense"]
        engine.write(dense, files[1], engine.example_of(file, batches[0]))
        small_s, dense_s = engine.seconds(files, batches)
        peaks = [engine.peak_bytes(path, batches[0]) if memory else None for path in files]
        return dense_s / small_s, peaks
