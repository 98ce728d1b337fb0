"""Hold out some calibration samples, to judge on them everything that was fitted to the others.

The held-out samples are those with the smallest digests of their content. This does not depend on the order, so a
shuffling loader gives the same ones on every pass, without keeping the others in memory. Equal samples stay together,
so that no copy of a fitted sample is held out; those that would be too many are passed over.

The rows of a batch that belong to one sample are verified: the tensors with as many rows as the output has samples are
split, and the model must give the same outputs, and the loss the same values, for some of the samples alone as in the
whole batch; for one batch of each size that is cut, both of its parts are tried as well. If they differ (rows are
positions, samples depend on each other, the batch size matters, the loss reads something else that is as long), whole
batches are held out, from a list of at least `MIN_SAMPLES`. If that is not possible either, the reason is reported.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.model import forward as forwards
from qcompress.model.alone import same_losses, same_outputs
from qcompress.model.losses import Loss
from qcompress.model.opened import opened_of
from qcompress.model.steady import Steady, steady
from qcompress.model.tensors import bytes_of

MIN_SAMPLES = 4
"""Minimum number of samples needed for holding some out."""

SHARE = 0.25
"""Share of the samples to hold out, rounded up."""

MAX_KEPT = 1024
"""Maximum number of held-out samples."""

Path = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Calibration data divided into two parts.

    Attributes:
        calibration: re-iterable batches to measure and fit on; all the data if nothing was held out.
        kept: batches of the held-out samples, in memory; empty if nothing was held out.
        num_kept, num_samples: number of held-out samples and of all samples (or of batches, see ``unit``).
        unit: ``"samples"`` or ``"batches"``.
        why_not: why nothing, or only whole batches, were held out; empty if samples were.
    """

    calibration: Iterable[Any]
    kept: tuple[Any, ...] = ()
    num_kept: int = 0
    num_samples: int = 0
    unit: str = "samples"
    why_not: str = ""

    @property
    def num_wanted(self) -> int:
        """Number of samples that would be held out if no two were equal."""
        return _num_kept(self.num_samples)


def split_samples(
    model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None = None, loss: Loss | None = None
) -> Split:
    """Hold out `SHARE` of the samples of ``data`` (at most `MAX_KEPT`), if there are at least `MIN_SAMPLES`.

    Args:
        model: model that is run on the first batch, in evaluation mode, to see which dimensions count samples.
        data: re-iterable batches.
        forward: how to run a batch, if `qcompress.model.forward.default_forward` does not fit.
        loss: loss that must not depend on which samples are in a batch, if it reads the batch.

    >>> data = [torch.arange(24.0).view(12, 2), torch.arange(24.0, 40.0).view(8, 2)]
    >>> split = split_samples(nn.Linear(2, 3), data)
    >>> split.num_kept, sum(map(len, split.kept)), sum(map(len, split.calibration))
    (5, 5, 15)
    """
    data = forwards.checked_data(data)
    try:
        batch = forwards.first_batch(data)
        alone = None if opened_of(model) is not None else _Alone(model, steady(forward), loss)
        cut = _rows_of(batch) if alone is None else _cut_of(batch, alone)
        digests = [digest for batch in data for digest in cut.digests(batch)]
        if len(digests) < MIN_SAMPLES:
            return Split(
                calibration=data,
                num_samples=len(digests),
                why_not=f"{len(digests)} samples are too few to hold some out (at least {MIN_SAMPLES} are needed)",
            )
        held = _to_hold_out(digests)
        if not held:
            return Split(calibration=data, num_samples=len(digests), why_not=_all_copies(digests, "samples"))
        kept = tuple(part for batch in data if (part := cut.take(batch, _within(cut, batch, held))) is not None)
        num_kept = sum(digest in held for digest in digests)
        if sum(len(cut.digests(batch)) for batch in kept) != num_kept:
            raise _UnclearError("the data differs from pass to pass (random crops, for example)")
        if alone is not None:
            _require_same_in_parts(data, cut, held, alone)
    except _UnclearError as unclear:
        return _whole_batches(data, str(unclear))
    rest = _Rest(data, cut, held)
    calibration = list(rest) if isinstance(data, Sequence) else rest
    return Split(calibration=calibration, kept=kept, num_kept=num_kept, num_samples=len(digests))


def _num_kept(num_samples: int) -> int:
    return min(math.ceil(SHARE * num_samples), MAX_KEPT)


def _to_hold_out(digests: Sequence[bytes]) -> frozenset[bytes]:
    """Return digests whose samples are held out, with their copies: about `SHARE` of all, and no more than half.

    The result is empty if every sample has too many copies.
    """
    counts, total, held = Counter(digests), 0, set()
    wanted, most = _num_kept(len(digests)), min(len(digests) // 2, MAX_KEPT)
    for digest in sorted(counts):
        if total + counts[digest] <= wanted:
            held.add(digest)
            total += counts[digest]
    others = [(count, digest) for digest, count in counts.items() if digest not in held]
    if others and total < wanted:
        count, digest = min(others)
        if total + count <= most and (not held or total + count - wanted < wanted - total):
            held.add(digest)
    return frozenset(held)


def _all_copies(digests: Sequence[bytes], unit: str) -> str:
    """Say why none of these can be held out."""
    different = len(set(digests))
    if different == 1:
        return f"all {unit} are equal"
    return f"the {len(digests)} {unit} are copies of {different}, and those of one of them are too many to hold out"


def _whole_batches(data: Iterable[Any], why_not: str) -> Split:
    """Hold out whole batches of a list."""
    if not isinstance(data, Sequence) or len(data) < MIN_SAMPLES:
        return Split(calibration=data, why_not=why_not)
    digests = [_digest(_leaves(batch)) for batch in data]
    held = _to_hold_out(digests)
    if not held:
        return Split(calibration=data, why_not=f"{why_not}; {_all_copies(digests, 'batches')}")
    kept = [batch for batch, digest in zip(data, digests, strict=True) if digest in held]
    rest = [batch for batch, digest in zip(data, digests, strict=True) if digest not in held]
    return Split(
        calibration=rest,
        kept=tuple(kept),
        num_kept=len(kept),
        num_samples=len(data),
        unit="batches",
        why_not=why_not,
    )


class _UnclearError(Exception):
    """Why samples cannot be separated."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """The values inside a batch that have one row per sample."""

    paths: frozenset[Path]

    def num_samples(self, batch: Any) -> int:
        counts = {len(value) for path, value in _leaves(batch) if path in self.paths}
        if not counts:
            raise _UnclearError("the batches have different forms (a tensor and a tuple, for example)")
        if len(counts) != 1:
            raise _UnclearError(
                f"the tensors of a batch disagree on the number of samples ({', '.join(map(str, sorted(counts)))})"
            )
        return counts.pop()

    def digests(self, batch: Any) -> list[bytes]:
        """Return a digest for every sample."""
        count = self.num_samples(batch)
        rows = [(path, value) for path, value in _leaves(batch) if path in self.paths]
        return [_digest([(path, value[index]) for path, value in rows]) for index in range(count)]

    def take(self, batch: Any, chosen: Sequence[bool]) -> Any:
        """Return the chosen samples of a batch; the batch itself for all of them, None for none."""
        if all(chosen):
            return batch
        return (
            _mapped(batch, self.paths, [i for i, chosen_sample in enumerate(chosen) if chosen_sample])
            if any(chosen)
            else None
        )


@dataclass(frozen=True, slots=True)
class _Rest:
    """The samples that were not held out, selected again on every pass."""

    data: Iterable[Any]
    cut: _Cut
    held: frozenset[bytes]

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            rest = self.cut.take(batch, [not inside for inside in _within(self.cut, batch, self.held)])
            if rest is not None:
                yield rest


def _within(cut: _Cut, batch: Any, held: frozenset[bytes]) -> list[bool]:
    return [digest in held for digest in cut.digests(batch)]


@dataclass(frozen=True, slots=True)
class _Alone:
    """The check that a model, and a loss if there is one, treat samples alone as within their batch."""

    model: nn.Module
    run: Steady
    loss: Loss | None

    def require_same(self, batch: Any, cut: _Cut, chosen: Sequence[bool], whole: Tensor) -> None:
        """Compare the outputs and losses of the chosen samples alone with theirs in a batch with the outputs ``whole``.

        Raises:
            _UnclearError: they differ, or the model or the loss does not accept a part of a batch.
        """
        part, mask = cut.take(batch, chosen), torch.tensor(chosen, device=whole.device)
        try:
            output = forwards.run(self.model, part, self.run)
        except Exception as error:  # a model may raise anything for a batch size that it does not accept
            raise _UnclearError(f"the model does not accept a part of a batch: {error}") from error
        if not same_outputs(self.model, output, whole[mask]):
            raise _UnclearError(
                f"the model gives other outputs for some samples alone than within their batch "
                f"({self._why(batch, whole)})"
            )
        if self.loss is not None and not same_losses(self.model, self.loss, (part, output), (batch, whole), mask):
            raise _UnclearError(
                "the loss gives other values for some samples alone than within their batch: what it reads of a batch "
                "is not one row per sample, or it compares samples with each other"
            )

    def _why(self, batch: Any, whole: Tensor) -> str:
        """Say why outputs of some samples alone may differ."""
        if not same_outputs(self.model, forwards.run(self.model, batch, self.run.reseeded()), whole):
            return "it draws random numbers, which differ with the number of samples"
        why = "its rows are not samples, or samples depend on each other"
        if self.run.moved:
            why += f", perhaps through {', '.join(sorted(self.run.moved)[:3])}, which it changes while it runs"
        return why


def _cut_of(batch: Any, alone: _Alone) -> _Cut:
    """Determine which tensors to split, and verify it on the model.

    Raises:
        _UnclearError: no tensor has as many rows as the output has samples, or samples depend on each other.
    """
    with forwards.evaluating(alone.model), torch.no_grad():
        whole = forwards.run(alone.model, batch, alone.run)
        count = len(whole)
        cut = _Cut(frozenset(path for path, value in _leaves(batch) if _can_be_cut(value) and len(value) == count))
        if not cut.paths:
            raise _UnclearError(f"no tensor of the first batch has as many rows as the output has samples ({count})")
        if count > 1:  # a batch of one sample cannot be split
            alone.require_same(batch, cut, [index % 2 == 1 for index in range(count)], whole)
    return cut


def _require_same_in_parts(data: Iterable[Any], cut: _Cut, held: frozenset[bytes], alone: _Alone) -> None:
    """Compare both parts with the whole batch, for one batch of every size that is cut in two.

    Raises:
        _UnclearError: they differ.
    """
    seen = set()
    with forwards.evaluating(alone.model), torch.no_grad():
        for number, batch in enumerate(data, 1):
            held_out = _within(cut, batch, held)
            sizes = len(held_out), sum(held_out)
            if sizes in seen or sizes[1] in (0, sizes[0]):
                continue
            seen.add(sizes)
            with forwards.first_pass(batch, f"batch {number} of the data"):
                whole = forwards.run(alone.model, batch, alone.run)
            for chosen in (held_out, [not inside for inside in held_out]):
                alone.require_same(batch, cut, chosen, whole)


def _rows_of(batch: Any) -> _Cut:
    """Split the tensors of a batch by rows, which are the samples of an opened model.

    Raises:
        _UnclearError: the tensors differ in their numbers of rows.
    """
    cut = _Cut(frozenset(path for path, value in _leaves(batch) if _can_be_cut(value)))
    cut.num_samples(batch)
    return cut


def _leaves(value: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """Return everything inside a batch that has rows: tensors, arrays, and lists of plain values."""
    if isinstance(value, (Tensor, np.ndarray)):
        return [(path, value)] if value.ndim else []
    if isinstance(value, Mapping):
        return [leaf for key in value for leaf in _leaves(value[key], (*path, key))]
    if isinstance(value, (tuple, list)):
        if value and all(isinstance(item, (str, bytes, int, float)) for item in value):
            return [(path, value)]
        return [leaf for index, item in enumerate(value) for leaf in _leaves(item, (*path, index))]
    return []


def _can_be_cut(value: Any) -> bool:
    return not (isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided))


def _mapped(value: Any, paths: frozenset[Path], rows: list[int], path: Path = ()) -> Any:
    """Return the batch with the given rows of the values in ``paths``; everything else unchanged."""
    if path in paths:
        if isinstance(value, (tuple, list)):
            return type(value)(value[row] for row in rows)
        return value[torch.tensor(rows, device=value.device) if isinstance(value, Tensor) else rows]
    if isinstance(value, Mapping):
        by_key = {key: _mapped(value[key], paths, rows, (*path, key)) for key in value}
        return by_key if type(value) is dict else type(value)(by_key)  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        items = [_mapped(item, paths, rows, (*path, index)) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _digest(leaves: Iterable[tuple[Path, Any]]) -> bytes:
    digest = hashlib.sha256()
    for path, value in leaves:
        digest.update(repr(path).encode())
        if isinstance(value, Tensor):
            digest.update(bytes_of(_dense(value)))
        else:
            digest.update(value.tobytes() if isinstance(value, (np.ndarray, np.generic)) else repr(value).encode())
    return digest.digest()


def _dense(value: Tensor) -> Tensor:
    if value.is_nested:
        return torch.cat([part.reshape(-1) for part in value.unbind()])
    return value if value.layout == torch.strided else value.to_dense()
