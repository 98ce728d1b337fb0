"""`verify`: an engine's file against the model it was written from, by running both on samples."""

import copy
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formulations.files import AnyPath
from qcompress.compressed.factored import fold_
from qcompress.compressed.record import detach, record_of
from qcompress.engines.base import Engine, EngineRun
from qcompress.engines.export import HasModel, model_of, size_on_disk
from qcompress.engines.registry import as_engine
from qcompress.errors import DataError
from qcompress.model import forward as forwards
from qcompress.model.opened import opened_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How an engine's file compares with the emulation that the choice was made with.

    Attributes:
        size_bytes: of the file.
        max_difference: largest difference between the engine's outputs and the emulation's.
        kl: mean KL divergence from the emulation's outputs to the engine's, nats per sample, over the last dimension.
        agreement: share of outputs whose largest entry is the same.
        speedup: time of the same model with dense weights over that of the file, both in the engine; not-a-number of
            an opened model, whose time is that of reading.
        peak_bytes, dense_peak_bytes: most memory that loading the file and running a batch takes in its own process,
            and that with dense weights; None where the engine does not tell.
        ok: nothing is wrong with it.
        why_not: what is wrong: bytes that differ from the prediction, weights or outputs from the emulation.
    """

    size_bytes: int
    max_difference: float
    kl: float
    agreement: float
    speedup: float
    ok: bool
    why_not: str
    peak_bytes: int | None = None
    dense_peak_bytes: int | None = None


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
        path: what `export` wrote.
        model_or_result: from this.
        data: batches; a few samples are enough.
        target: as for `export`.
        memory: whether to measure the peak memory of both, in processes of their own.

    Raises:
        EngineError: an unknown engine, or a file that it does not run.
        DataError: no batch.
        MissingError: a package of the engine is missing.
        FileNotFoundError: there is no such file.
    """
    engine, model, file = as_engine(target), model_of(model_or_result), Path(path)
    if not file.exists():
        raise FileNotFoundError(2, "there is no such file", str(file))
    batches = list(forwards.checked_data(data))
    if not batches:
        raise DataError("there is nothing to verify with because the data is empty: give at least one batch")
    with forwards.evaluating(model):
        expected = engine.emulate(model, batches)
    by_block = opened_of(model) is not None
    run = engine.run_by_block(file, batches) if by_block else engine.run(file, batches)
    difference = compared(run, expected)
    size_bytes, predicted = size_on_disk(file), _predicted_bytes(engine, model, batches[0])
    wrong = engine.check(file, model)
    if size_bytes != predicted:
        wrong = f"the file takes {size_bytes:,} bytes instead of the predicted {predicted:,}"
    elif not wrong and not difference.relative <= engine.tolerance:
        wrong = (
            f"its outputs differ from the emulation's by {difference.relative:.2%} of their spread, "
            f"{engine.tolerance:.2%} at most is to be expected"
        )
    faster = math.nan
    peaks: list[int | None] = [None, None]
    if not by_block:
        faster, peaks = _against_dense(engine, model, file, batches, memory=memory)
    return Verification(
        size_bytes=size_bytes,
        max_difference=difference.largest,
        kl=difference.kl,
        agreement=difference.agreement,
        speedup=faster,
        ok=not wrong,
        why_not=wrong,
        peak_bytes=peaks[0],
        dense_peak_bytes=peaks[1],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Between outputs, see `Verification`; ``relative`` is the root mean square over the expected spread."""

    largest: float
    relative: float
    kl: float
    agreement: float


def compared(run: EngineRun, expected: EngineRun) -> Difference:
    """How the outputs ``(…, numbers)`` of two runs differ.

    >>> same = EngineRun(outputs=(torch.eye(3),), wall_s=1.0)
    >>> compared(same, same)
    Difference(largest=0.0, relative=0.0, kl=0.0, agreement=1.0)
    """
    actual, wanted = (torch.cat([_rows(output) for output in outcome.outputs]) for outcome in (run, expected))
    log_p, log_q = wanted.log_softmax(-1), actual.log_softmax(-1)
    spread = (wanted - wanted.mean(-1, keepdim=True)).square().mean().sqrt()
    off = (actual - wanted).square().mean().sqrt()
    return Difference(
        largest=float((actual - wanted).abs().max()),
        relative=float(off / spread) if spread else float(off > 0),
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        agreement=float((actual.argmax(-1) == wanted.argmax(-1)).double().mean()),
    )


def _rows(output: Tensor) -> Tensor:
    return output.detach().cpu().double().reshape(-1, output.shape[-1])


def _predicted_bytes(engine: Engine, model: nn.Module, example: Any) -> int:
    record = record_of(model)
    parts = () if record is None else tuple(item.part for item in record.parts)
    transforms = () if record is None else tuple((item.transform,) for item in record.parts)
    return engine.sizes(model, parts, transforms, example).of([0] * len(parts))


def speedup_of(engine: Engine, original: nn.Module, smaller: nn.Module, batches: Sequence[Any]) -> float:
    """Time in the engine of one model over that of another, both taken in turn."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "original", Path(folder) / "smaller"]
        for file, model in zip(files, (original, smaller), strict=True):
            engine.write(model, file, batches[0])
        before_s, after_s = engine.seconds(files, batches)
    return before_s / after_s


def _against_dense(
    engine: Engine, model: nn.Module, file: Path, batches: Sequence[Any], *, memory: bool
) -> tuple[float, list[int | None]]:
    """How much faster the file is than the model with dense weights in the engine, and the memory that both take."""
    dense = fold_(copy.deepcopy(model))
    detach(dense)
    with tempfile.TemporaryDirectory() as folder:
        files = [file, Path(folder) / "dense"]
        engine.write(dense, files[1], batches[0])
        small_s, dense_s = engine.seconds(files, batches)
        peaks = [engine.peak_bytes(path, batches[0]) if memory else None for path in files]
        return dense_s / small_s, peaks
