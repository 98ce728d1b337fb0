"""Sum costs and effects over all batches, saving them so that an interrupted run resumes."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from formulations.files import AnyPath
from qcompress.errors import DataError
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.stopping import NEVER, Stop
from qcompress.measuring.sums import Sums
from qcompress.measuring.workers import BatchResult, Work, results
from qcompress.model import forward as forwards
from qcompress.model.losses import Loss
from qcompress.model.passes import number_of
from qcompress.model.steady import steady

SAVE_EVERY_S = 2.0


def accumulate(
    model: nn.Module,
    batches: Iterable[Any],
    candidates: Candidates,
    loss: Loss,
    method: str,
    seed: int,
    forward: forwards.Forward | None,
    settings: list[Any],
    *,
    original: nn.Module | None = None,
    tried: Mapping[str, str] = MappingProxyType({}),
    jobs: int = 1,
    cache: AnyPath | None = None,
    stop: Stop = NEVER,
    on_progress: Callable[[MeasureProgress], None] | None = None,
) -> Sums:
    """Sum costs and effects over all batches; resume from the cache file if it belongs to this measurement.

    Args:
        model: model whose weights the options change.
        batches: the data.
        candidates: options of the model's parts.
        loss: the loss, relative to the original's outputs.
        method: same as in `measure`.
        seed: same as in `measure`.
        forward: same as in `measure`.
        cache: same as in `measure`.
        stop: when to stop before all batches are done.
        on_progress: same as in `measure`.
        settings: everything besides the candidates that the measurement depends on, to detect another one's cache;
            also the digest of the options' code before any of it ran, as it may keep something when it runs.
        original: the original model, if ``model`` is not the original.
        tried: names of parts known to need direct evaluation, and why.
        jobs: same as in `measure`.

    Raises:
        DataError: there is no sample, or a loss is not finite.
        ModelError: the loss of an option is not finite; the message names the option.
    """
    transforms = [[transform.to_json() for transform in options] for options in candidates.transforms]
    key = hashlib.sha256(json.dumps([*settings, transforms]).encode()).hexdigest()
    file = None if cache is None else Path(cache)
    if file is not None and file.exists():
        sums = Sums.load(file, key)
    else:
        sums = Sums(candidates.num_options, seed, by_sample=method == "sampled")
        sums.tried = dict(tried)
    begun = sums.first_tried is not None
    from_start = {} if method == "sampled" else tried  # weight gradients also capture uses outside a layer's calls
    work = Work(
        model=model, candidates=candidates, loss=loss, method=method, seed=seed, forward=steady(forward, seed),
        original=original, tried=from_start if sums.first_tried is None else sums.first_tried,
    )  # fmt: skip
    start = last_save = time.perf_counter()
    progress = partial(MeasureProgress, total_batches=number_of(batches))
    numbered = itertools.islice(enumerate(batches), sums.num_batches, None)
    in_order = _in_order(work, numbered, jobs, begun=begun)
    for result in in_order:
        sums.add(*result.effects)
        if sums.first_tried is None:
            sums.first_tried, sums.tried = result.tried, {}
        sums.tried |= result.tried
        work.forward.moved |= result.moved
        if file is not None and time.perf_counter() - last_save > SAVE_EVERY_S:
            sums.save(file, key)
            last_save = time.perf_counter()
        elapsed_s = time.perf_counter() - start
        if on_progress is not None:
            on_progress(progress(batches=sums.num_batches, num_samples=sums.num_samples, elapsed_s=elapsed_s))
        if reason := stop.reason(sums, candidates, elapsed_s):
            sums.stopped = reason
            in_order.close()
    if sums.num_samples == 0:
        raise DataError("the calibration data holds no sample")
    _require_finite(sums, candidates)
    return sums


def _require_finite(sums: Sums, candidates: Candidates) -> None:
    if len(wrong := np.flatnonzero(~np.isfinite(sums.cost))):
        part = int(np.searchsorted(candidates.offsets, wrong[0], side="right")) - 1
        raise candidates.not_finite(part, int(wrong[0] - candidates.offsets[part]))
    if not np.isfinite(sums.second).all():
        raise DataError("the measured loss increases are not finite; check the weights and the calibration data")


def _in_order(
    work: Work, batches: Iterator[tuple[int, Any]], jobs: int, *, begun: bool
) -> Generator[BatchResult, None, None]:
    """Compute the first remaining batch in this process, then the others with the knowledge it gave."""
    for number, batch in itertools.islice(batches, 1):
        first = work.result(number, batch)
        yield first
        work = replace(work.after(first), tried=work.tried) if begun else work.after(first)
    yield from results(work, batches, jobs)
