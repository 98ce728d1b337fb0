"""The batches of a measurement, in this process or distributed over others; each batch is an independent task.

The result of a batch depends only on the batch, its index and what the first batch revealed (`Work.tried`), so it does
not matter where it is computed; results are added up in the order of the batches. Distribution uses joblib: processes
of this machine by default, a cluster under ``joblib.parallel_config(backend="dask")`` or ``"ray"``. The work is packed
once and unpacked once in every process. If a process is lost, its unfinished batches are computed again.
"""

import contextlib
import hashlib
import itertools
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qcompress.errors import ModelError
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.effects import Effects
from qcompress.measuring.methods.direct import Direct
from qcompress.measuring.methods.fisher import Fisher
from qcompress.measuring.streamed.together import TogetherGradients
from qcompress.measuring.sums import probe_generator
from qcompress.model import forward as forwards
from qcompress.model.batches import samples
from qcompress.model.losses import Loss
from qcompress.model.steady import Steady
from qcompress.scalars import as_whole
from solvers.processes import allow_replacing_workers, is_loss

ROUND = 4
"""Batches per worker that are submitted before their results are awaited."""

MOST_LOSSES = 3
"""Number of workers that may be lost in a row, without any result in between, before giving up."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchResult:
    """The result of a batch.

    Attributes:
        effects: costs and effects of all options.
        tried: names of parts whose options were evaluated one by one, and why.
        apart: whether samples give the same outputs alone; None if not checked.
        together: number of samples that pass through the model's blocks together; None if not checked.
        moved: names of buffers that passes changed and that were restored.
    """

    effects: Effects
    tried: dict[str, str]
    apart: bool | None = None
    together: int | None = None
    moved: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """Everything that is needed to measure a batch.

    Attributes:
        model: the model whose weights the options change, in evaluation mode.
        candidates: its options.
        loss: the loss to measure.
        method: same as in `qcompress.measure`.
        seed: seed for the probes.
        forward: how to run a batch.
        original: the original model, if ``model`` is not the original.
        tried: names of parts to evaluate directly from the start, and why.
        apart, together: see `BatchResult`.
    """

    model: nn.Module
    candidates: Candidates
    loss: Loss
    method: str
    seed: int
    forward: Steady
    original: nn.Module | None = None
    tried: Mapping[str, str] = field(default_factory=dict)
    apart: bool | None = None
    together: int | None = None

    def after(self, first: BatchResult) -> "Work":
        """Return the work for all batches after the first."""
        return replace(self, tried=dict(first.tried), apart=first.apart, together=first.together)

    @forwards.layer_by_layer()
    def result(self, number: int, batch: Any) -> BatchResult:
        """Compute the result of the batch with this index."""
        with contextlib.ExitStack() as stack:
            for model in (self.model, self.original):
                if model is not None:
                    stack.enter_context(forwards.evaluating(model))
            means = self._means(first=number == 0)
            with torch.no_grad():
                reference = None if self.original is None else forwards.run(self.original, batch, self.forward)
            effects = means.batch_effects(batch, probe_generator(self.seed, number), reference)
            return self._result(means, effects)

    @forwards.layer_by_layer()
    def results_together(self, items: Sequence[tuple[int, Any]]) -> Iterator[BatchResult]:
        """Return the results of several batches, whose samples pass through the model's blocks together."""
        with forwards.evaluating(self.model):
            means = self._means(first=False)
            assert isinstance(means, TogetherGradients)  # noqa: S101
            generators = [probe_generator(self.seed, number) for number, _ in items]
            all_effects = means.effects_together([batch for _, batch in items], generators)
            return iter([self._result(means, effects) for effects in all_effects])

    def _result(self, means: "Direct | Fisher | TogetherGradients", effects: Effects) -> BatchResult:
        sampled = means if isinstance(means, TogetherGradients) else None
        return BatchResult(
            effects=effects._replace(blocks=list(effects.blocks)),
            tried=dict(means.tried),
            apart=None if sampled is None else sampled.apart,
            together=None if sampled is None else sampled.together,
            moved=frozenset(self.forward.moved),
        )

    def _means(self, *, first: bool) -> "Direct | Fisher | TogetherGradients":
        direct = Direct(self.model, self.candidates, self.loss, self.forward)
        if self.method == "direct":
            return direct
        if self.method == "sampled":
            return TogetherGradients(direct, self.tried, self.apart, self.together, check=first)
        return Fisher(direct, self.tried)


def results(work: Work, batches: Iterable[tuple[int, Any]], jobs: int = 1) -> Iterator[BatchResult]:
    """Yield the results of numbered batches, in order.

    Args:
        work: what the batches are measured with.
        batches: pairs of index and batch.
        jobs: same as in `qcompress.measure`; worker processes compute with one thread each.

    Raises:
        ModelError: the work cannot be sent to other processes, or workers are lost repeatedly.
    """
    if jobs == 1 and work.together:
        for items in _rounds(batches, work.together):
            yield from work.results_together(items)
        return
    if jobs == 1:
        for number, batch in batches:
            yield work.result(number, batch)
        return
    import joblib  # here: slow to import, and not needed for one process

    allow_replacing_workers()
    packed, source = _packed(work), iter(batches)
    count = joblib.effective_n_jobs(jobs)
    backend = joblib.parallel.get_active_backend()[0]
    given_back = "generator" if getattr(backend, "supports_return_generator", False) else "list"  # Ray only has "list"
    while waiting := list(itertools.islice(source, ROUND * count)):
        losses = 0
        while waiting:
            parallel = joblib.Parallel(n_jobs=jobs, return_as=given_back)
            try:
                under_way = parallel(joblib.delayed(_result)(*packed, *item) for item in list(waiting))
                for result in under_way:
                    yield result
                    waiting.pop(0)
                    losses = 0
            except GeneratorExit:
                if given_back == "generator":
                    with warnings.catch_warnings(action="ignore"):  # joblib's, that results are given up
                        under_way.close()
                raise
            except Exception as error:
                losses += 1
                if not is_loss(error):
                    raise
                if losses > MOST_LOSSES:
                    raise ModelError(
                        f"worker processes were lost {losses} times in a row at batch {waiting[0][0]} ({error}): "
                        "there may be too little memory; give smaller batches or fewer jobs"
                    ) from error


def _rounds(batches: Iterable[tuple[int, Any]], together: int) -> Iterator[list[tuple[int, Any]]]:
    """Group numbered batches, so that each group but the last has at least ``together`` samples."""
    waiting: list[tuple[int, Any]] = []
    count = 0
    for number, batch in batches:
        waiting.append((number, batch))
        count += sum(1 for _ in samples(batch))
        if count >= together:
            yield waiting
            waiting, count = [], 0
    if waiting:
        yield waiting


def checked_jobs(jobs: Any) -> int:
    """Return ``jobs`` if it is a valid number of processes.

    Raises:
        OptionsError: it is not.
    """
    if jobs == -1:
        return -1
    return as_whole(jobs, "jobs (worker processes; -1 for one per core)", least=1)


def _packed(work: Work) -> tuple[NDArray[np.uint8], str]:
    """Pack the work as an array, which joblib's backends share or send once; also returns its digest.

    Raises:
        ModelError: something in it cannot be sent.
    """
    import cloudpickle

    try:
        packed = cloudpickle.dumps(work)
    except Exception as error:  # whatever the model's own objects raise
        raise ModelError(
            f"the model, its forward or the loss cannot be sent to other processes ({error}); measure with jobs=1"
        ) from error
    return np.frombuffer(packed, dtype=np.uint8), hashlib.sha256(packed).hexdigest()


class _Held:
    """The work that this process has unpacked; batches take turns, because they change the model's weights."""

    def __init__(self) -> None:
        self.turn, self.key = threading.Lock(), ""
        self.work: Work | None = None


_held = _Held()


def _result(packed: NDArray[np.uint8], key: str, number: int, batch: Any) -> BatchResult:
    """In a worker: unpack the work once, and compute one batch."""
    import cloudpickle

    with _held.turn:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            if _held.work is None or _held.key != key:
                _held.work, _held.key = cloudpickle.loads(packed.tobytes()), key
            return _held.work.result(number, batch)
        finally:
            torch.set_num_threads(threads)
