"""`verify`: an engine's file against the model it was written from, by running both on samples."""

import copy
import tempfile
from collections.abc import Iterable
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How an engine's file compares with the emulation that the choice was made with.

    Attributes:
        size_bytes: of the file.
        max_difference: largest difference between the engine's outputs and the emulation's.
        kl: mean KL divergence from the emulation's outputs to the engine's, nats per sample, over the last dimension.
        agreement: share of outputs whose largest entry is the same.
        speedup: time of the same model with dense weights over that of the file, both in the engine.
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


def verify(
    path: AnyPath, model_or_result: nn.Module | HasModel, data: Iterable[Any], *, target: str | Engine
) -> Verification:
    """Run an engine's file on samples and compare it with the model that it was written from.

    Args:
        path: what `export` wrote.
        model_or_result: from this.
        data: batches; a few samples are enough.
        target: as for `export`.

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
        raise DataError("there is nothing to verify with: the data is empty, give at least one batch")
    with forwards.evaluating(model):
        expected = engine.emulate(model, batches)
    run = engine.run(file, batches)
    found = compared(run, expected)
    size_bytes, predicted = size_on_disk(file), _predicted_bytes(engine, model, batches[0])
    wrong = engine.check(file, model)
    if size_bytes != predicted:
        wrong = f"the file takes {size_bytes:,} bytes, predicted were {predicted:,}"
    elif not wrong and not found.relative <= engine.tolerance:
        wrong = (
            f"its outputs differ from the emulation's by {found.relative:.2%} of their spread, "
            f"{engine.tolerance:.2%} at most is to be expected"
        )
    return Verification(
        size_bytes=size_bytes,
        max_difference=found.largest,
        kl=found.kl,
        agreement=found.agreement,
        speedup=_dense_seconds(engine, model, batches) / run.wall_s,
        ok=not wrong,
        why_not=wrong,
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
    found, wanted = (torch.cat([_rows(output) for output in one.outputs]) for one in (run, expected))
    log_p, log_q = wanted.log_softmax(-1), found.log_softmax(-1)
    spread = (wanted - wanted.mean(-1, keepdim=True)).square().mean().sqrt()
    off = (found - wanted).square().mean().sqrt()
    return Difference(
        largest=float((found - wanted).abs().max()),
        relative=float(off / spread) if spread else float(off > 0),
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        agreement=float((found.argmax(-1) == wanted.argmax(-1)).double().mean()),
    )


def _rows(output: Tensor) -> Tensor:
    return output.detach().cpu().double().reshape(-1, output.shape[-1])


def _predicted_bytes(engine: Engine, model: nn.Module, example: Any) -> int:
    record = record_of(model)
    parts = () if record is None else tuple(item.part for item in record.parts)
    transforms = () if record is None else tuple((item.transform,) for item in record.parts)
    return engine.sizes(model, parts, transforms, example).of([0] * len(parts))


def _dense_seconds(engine: Engine, model: nn.Module, batches: list[Any]) -> float:
    """Time in the engine of the same model with weights as dense as they are here."""
    dense = fold_(copy.deepcopy(model))
    detach(dense)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dense"
        engine.write(dense, file, batches[0])
        return engine.run(file, batches).wall_s
