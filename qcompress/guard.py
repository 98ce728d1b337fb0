"""The guard: evaluate several candidate choices on held-out samples and take the one with the least true loss.

The solver's proof concerns the predicted loss. How good the prediction is shows only when the model runs on held-out
samples, which were never used for measuring or fitting. The guard tries the proposals of `qcompress.proposals` and,
if codes were compensated, the best of these rounded to nearest.

Few held-out samples give weak evidence: losses are heavy-tailed, a handful of samples dominates their mean, and among
a dozen choices some look better by chance. A choice with a lower loss than the reference is therefore a candidate only
if the difference is significant: the mean difference of the fourth roots of the losses, taken sample by sample (or
position by position, if outputs have positions), must be at least `CONFIDENCE` standard errors; and for ``kl`` also
that of the losses at softened outputs, which few samples do not dominate. All others are reported as undecided. The
reference is the choice with weak pair terms, by a mean of plain costs and, if there are any, those at softened outputs;
or the refined one; with a time budget in an engine, it is the best uniform setting in time.

All tried choices are within the budgets. The guard returns the candidate with the least loss; of equal ones the first.
One with outputs that are not finite, on the held-out samples or on those that were measured, fails.
What it decides is the way of choosing: `compress` then repeats the winning way with the held-out samples as well.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from formulations import Problem
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from qcompress.errors import ModelError
from qcompress.measurement import Measurement
from qcompress.measuring.true_loss import TrueLoss, standard_error
from qcompress.model import forward as forwards
from qcompress.model.batch_norm import reestimate_
from qcompress.model.losses import Loss, LossFunction
from qcompress.model.parts import Part
from qcompress.model.steady import steady
from qcompress.proposals import ADDITIVE, SEPARATOR, Proposal, rounded_to_nearest
from qcompress.transforms.base import Transform

Rounding = Callable[[nn.Module, Iterable[tuple[Part, Transform]]], AbstractContextManager[None]]
"""A function like `Engine.rounding`."""

CONFIDENCE = 1.5
"""Standard errors that a mean difference of losses must exceed to be significant."""

MOST_NEAREST = 2
"""Number of choices, the best so far, that are also tried rounded to nearest."""

FILE_KIND = FileKind("qcompress guard", version=1)


class Candidate(NamedTuple):
    """A choice that was tried: its predicted loss, true loss on the held-out samples, and use of each resource.

    The true loss is infinite if outputs or losses are not finite.
    """

    name: str
    loss_predicted: float
    loss_validation: float
    usage: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON, where an infinite loss is None."""
        loss = self.loss_validation
        return {**self._asdict(), "loss_validation": loss if np.isfinite(loss) else None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Candidate":
        """Undo `to_json`."""
        loss = value["loss_validation"]
        return cls(**{**value, "loss_validation": float("inf") if loss is None else loss})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOutLosses:
    """Losses of a choice on the held-out samples.

    Attributes:
        mean: mean per sample.
        each: loss of every sample and position.
        softened: the same at softened outputs, or None.
        error: standard error of ``mean``, or None (see `standard_error`).
    """

    mean: float
    each: NDArray[np.float64]
    softened: NDArray[np.float64] | None = None
    error: float | None = None

    @classmethod
    def of(
        cls, batches: Sequence[NDArray[np.float64]], softened: Sequence[NDArray[np.float64]] | None = None
    ) -> "HeldOutLosses":
        """Return the losses from ``(samples, positions)`` for every batch, also at softened outputs if given."""
        samples = np.concatenate([batch.mean(axis=1) for batch in batches])
        if not np.isfinite(samples).all():
            return cls.failed()
        return cls(
            mean=float(samples.mean()),
            each=np.concatenate([batch.ravel() for batch in batches]),
            softened=None if softened is None else np.concatenate([batch.ravel() for batch in softened]),
            error=standard_error(samples),
        )

    @classmethod
    def failed(cls) -> "HeldOutLosses":
        """Return the losses of a choice whose outputs or losses are not finite."""
        return cls(mean=float("inf"), each=np.zeros(0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guarded:
    """Result of the guard.

    Attributes:
        best: the candidate with the least loss.
        candidates: all candidates, in the order in which they were tried.
        undecided: choices with a lower loss than the reference, but by no more than chance.
        error: standard error of the best candidate's loss, or None (see `standard_error`).
    """

    best: Proposal
    candidates: tuple[Candidate, ...]
    undecided: tuple[Candidate, ...] = ()
    error: float | None = None

    @property
    def won(self) -> Candidate:
        """The figures of the best candidate."""
        return next(candidate for candidate in self.candidates if candidate.name == self.best.name)

    def save(self, path: AnyPath) -> None:
        """Write it as JSON, atomically."""
        tried = {
            name: [candidate.to_json() for candidate in group]
            for name, group in (("candidates", self.candidates), ("undecided", self.undecided))
        }
        FILE_KIND.write_json(path, {"best": self.best.to_json(), **tried, "error": self.error})

    @classmethod
    def load(cls, path: AnyPath) -> "Guarded":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file does not hold such JSON.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
            return cls(
                best=Proposal.from_json(value["best"]),
                candidates=tuple(map(Candidate.from_json, value["candidates"])),
                undecided=tuple(map(Candidate.from_json, value["undecided"])),
                error=value["error"],
            )


def guard(
    measurement: Measurement,
    problem: Problem,
    first: Iterable[Proposal],
    seen_of: Callable[[Proposal], HeldOutLosses],
    *,
    base: str = ADDITIVE,
    is_finite: Callable[[Proposal], bool] = lambda _: True,
) -> Guarded:
    """Try proposals, then the best of them rounded to nearest, and take the best candidate.

    Args:
        measurement: the measurement that the problem was made from.
        problem: problem that checks budgets and predicts losses.
        first: proposals to try, see `proposals`; those over budget are skipped.
        seen_of: function that returns a proposal's losses on held-out samples, see `KeptLoss`.
        base: name of the reference proposal, which others have to beat; the first proposal if none has this name.
        is_finite: function that says whether the outputs are finite on the other samples, too. Only the best proposal
            is checked; if its outputs are not finite, it counts as failed, and the next one is checked.
    """
    known: dict[tuple[bytes, tuple[int, ...]], HeldOutLosses] = {}

    def seen(proposal: Proposal) -> HeldOutLosses:
        key = _key(proposal)
        if key not in known:
            known[key] = seen_of(proposal)
        return known[key]

    tried = [proposal for proposal in first if problem.evaluate(proposal.choice).feasible]
    standard = next((attempt for attempt in tried if attempt.name == base), tried[0])
    for proposal in sorted(_different(tried), key=lambda candidate: seen(candidate).mean)[:MOST_NEAREST]:
        tried.extend(rounded_to_nearest(measurement, proposal))
    everything = list(map(_named_by_all, _alike(tried)))
    while True:
        candidates = [item for item in everything if _may_win(seen(standard), seen(item))]
        best = min(candidates, key=lambda candidate: seen(candidate).mean)
        if not np.isfinite(seen(best).mean) or is_finite(best):
            break
        known[_key(best)] = HeldOutLosses.failed()

    def figures(proposal: Proposal) -> Candidate:
        judged = problem.evaluate(proposal.choice)
        return Candidate(proposal.name, judged.objective, seen(proposal).mean, judged.usage)

    return Guarded(
        best=best,
        candidates=tuple(map(figures, candidates)),
        undecided=tuple(figures(item) for item in everything if item not in candidates),
        error=seen(best).error,
    )


def _may_win(standard: HeldOutLosses, other: HeldOutLosses) -> bool:
    return not other.mean < standard.mean or stands_out(standard, other)


def _alike(proposals: Iterable[Proposal]) -> list[list[Proposal]]:
    """Group equal proposals, in the order of their first occurrences."""
    groups: dict[tuple[bytes, tuple[int, ...]], list[Proposal]] = {}
    for proposal in proposals:
        groups.setdefault(_key(proposal), []).append(proposal)
    return list(groups.values())


def _key(proposal: Proposal) -> tuple[bytes, tuple[int, ...]]:
    return proposal.choice.tobytes(), proposal.nearest


def _different(proposals: Iterable[Proposal]) -> list[Proposal]:
    return [first for first, *_ in _alike(proposals)]


def _named_by_all(alike: list[Proposal]) -> Proposal:
    """Return one of several equal proposals under all their names."""
    return replace(alike[0], name=SEPARATOR.join(dict.fromkeys(proposal.name for proposal in alike)))


def stands_out(standard: HeldOutLosses, other: HeldOutLosses) -> bool:
    """Whether the loss of ``other`` is significantly lower than that of ``standard``.

    >>> rng = np.random.default_rng(0)
    >>> losses = rng.lognormal(size=64)
    >>> standard, lower = (HeldOutLosses(mean=1.0, each=each) for each in (losses, 0.9 * losses))
    >>> noisy = HeldOutLosses(mean=1.0, each=rng.permutation(losses))
    >>> stands_out(standard, lower), stands_out(standard, noisy)
    (True, False)
    """
    if not np.isfinite(standard.mean):
        return bool(np.isfinite(other.mean))
    pairs = [(standard.each, other.each)]
    if standard.softened is not None and other.softened is not None:
        pairs.append((standard.softened, other.softened))
    gains = [_fourth_root(before) - _fourth_root(after) for before, after in pairs]
    return all(len(gain) > 1 and gain.mean() > CONFIDENCE * gain.std(ddof=1) / len(gain) ** 0.5 for gain in gains)


def _fourth_root(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.sign(losses) * np.abs(losses) ** 0.25)


class KeptLoss:
    """Losses of proposals on held-out batches; infinite if outputs or losses are not finite.

    Args:
        model: the measured model; it is not modified.
        measurement: the measurement that the proposals choose from.
        kept: the held-out batches.
        data: the batches for `is_finite`.
        loss: same as in `measure`.
        forward: same as in `measure`.
        batch_norm_data: batches on which to re-estimate batch-norm statistics for every proposal, as in
            `qcompress.apply`.
        original: same as in `measure`.
        rounding: makes a context manager in which the model with a choice rounds what its engine rounds.
    """

    def __init__(
        self,
        model: nn.Module,
        measurement: Measurement,
        kept: Iterable[Any],
        *,
        data: Iterable[Any] = (),
        loss: str | LossFunction | Loss = "kl",
        forward: forwards.Forward | None = None,
        batch_norm_data: Iterable[Any] | None = None,
        original: nn.Module | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        options = [(*transforms, *(item.nearest for item in transforms)) for transforms in measurement.transforms]
        wider = replace(measurement, transforms=tuple(options))
        self._options, self._parts = options, measurement.parts
        self._true_loss = TrueLoss(model, wider, kept, loss=loss, forward=forward, original=original)
        self._losses = [own for own in (self._true_loss.loss, self._true_loss.loss.softened) if own is not None]
        self._data, self._forward = data, steady(forward)
        self._given_forward = forward  # a steady one restores running statistics
        self._batch_norm_data, self._rounding = batch_norm_data, rounding

    def __call__(self, proposal: Proposal) -> HeldOutLosses:
        """Return the losses of a proposal."""
        try:
            with self._chosen(proposal) as choice:
                return HeldOutLosses.of(*self._true_loss.by_position_of(choice, self._losses))
        except ModelError:  # a choice may make the outputs non-finite
            return HeldOutLosses.failed()

    def is_finite(self, proposal: Proposal) -> bool:
        """Whether the outputs and losses of a proposal are finite on the other batches as well."""
        loss = self._true_loss.loss
        try:
            with self._chosen(proposal):
                model = self._true_loss.emulation.model
                with forwards.evaluating(model), torch.no_grad():
                    runs = ((batch, forwards.run(model, batch, self._forward)) for batch in self._data)
                    values = (output if (own := loss.values(output, batch)) is None else own for batch, output in runs)
                    return all(bool(value.isfinite().all()) for value in values)
        except ModelError:
            return False

    @contextmanager
    def _chosen(self, proposal: Proposal) -> Iterator[NDArray[np.int64]]:
        """Apply the proposal's options to the model inside the block; yield their indices."""
        choice = proposal.choice[: len(self._options)].copy()
        for part in proposal.nearest:
            choice[part] += len(self._options[part]) // 2
        self._true_loss.emulation.put(choice)
        model = self._true_loss.emulation.model  # another one where channels are removed
        if self._batch_norm_data is not None:
            reestimate_(model, self._batch_norm_data, self._given_forward)
        chosen = zip(self._parts, (own[option] for own, option in zip(self._options, choice, strict=True)), strict=True)
        with nullcontext() if self._rounding is None else self._rounding(model, chosen):
            yield choice
