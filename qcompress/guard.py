"""The guard: evaluate several candidate choices on held-out samples and take the one that is most likely the best.

The solver's proof concerns the predicted loss. How good the prediction is shows only when the model runs on held-out
samples, which were never used for measuring or fitting. The guard tries the proposals of `qcompress.proposals` and,
if codes were compensated, the best of these rounded to nearest.

Few held-out samples give weak evidence: losses are heavy-tailed, a handful of samples dominates their mean, and among
a dozen choices some look better by chance. So the relative advantage of a choice over the reference is estimated as a
posterior mean: of the difference of the held-out losses, whose error follows from its spread over the samples, and of
the difference that the predictions without pair terms say, which is off by about `PRIOR`. The reference is the choice
with weak pair terms, by a mean of plain costs and, if there are any, those at softened outputs; or the refined one. The
choice without pair terms and the uniform settings take its place if their advantage is positive. Any other choice is
taken only if its advantage exceeds `CONFIDENCE` standard deviations. Choices with a lower loss than the one taken are
reported as undecided. With a time budget in an engine the reference is the best uniform setting in time, and every
other choice must be clearly better.

All tried choices are within the budgets. The guard takes the one with the largest advantage; of equal ones the first.
One with outputs that are not finite, on the held-out samples or on those that were measured, fails.
What it decides is the way of choosing: `compress` then repeats the winning way with the held-out samples as well.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
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
from qcompress.settings import UNIFORM
from qcompress.transforms.base import Transform

Rounding = Callable[[nn.Module, Iterable[tuple[Part, Transform]]], AbstractContextManager[None]]
"""A function like `Engine.rounding`."""

CONFIDENCE = 1.0
"""Standard deviations that an advantage must exceed to be clear."""

PRIOR = 0.35
"""Standard deviation of true relative differences of losses around the predicted ones.

It and `CONFIDENCE` were chosen on other networks than those of ``benchmarks.trust``.
"""

MOST_NEAREST = 2
"""Number of choices, the best so far, that are also tried rounded to nearest."""

RESOLUTION = 1e-3
"""Least standard error of a relative difference."""

RULE = (CONFIDENCE, PRIOR, RESOLUTION)
"""What a decision depends on besides the losses."""

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
        samples: ``(samples,)`` losses.
        mean: their mean; infinite if outputs or losses are not finite.
        error: standard error of ``mean``, or None (see `standard_error`).
    """

    samples: NDArray[np.float64]
    mean: float
    error: float | None

    @classmethod
    def of(cls, samples: NDArray[np.float64]) -> "HeldOutLosses":
        """Return the losses from those of every sample."""
        if not np.isfinite(samples).all():
            return cls.failed()
        return cls(samples=samples, mean=float(samples.mean()), error=standard_error(samples))

    @classmethod
    def failed(cls) -> "HeldOutLosses":
        """Return the losses of a choice whose outputs or losses are not finite."""
        return cls(samples=np.zeros(0), mean=float("inf"), error=None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guarded:
    """Result of the guard.

    Attributes:
        best: the choice that was taken.
        candidates: it and all choices with no lower loss, in the order in which they were tried.
        undecided: choices with a lower loss than the one taken, but predicted to be worse or not clearly better.
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
    timed: bool = False,
    is_finite: Callable[[Proposal], bool] = lambda _: True,
) -> Guarded:
    """Try proposals, then the best of them rounded to nearest, and take the one with the largest advantage.

    Args:
        measurement: the measurement that the problem was made from.
        problem: problem that checks budgets and predicts losses.
        first: proposals to try, see `proposals`; those over budget are skipped.
        seen_of: function that returns a proposal's losses on held-out samples, see `KeptLoss`.
        base: name of the reference proposal; the first proposal if none has this name.
        timed: whether there is a time budget in an engine, so that nothing takes the reference's place.
        is_finite: function that says whether the outputs are finite on the other samples, too. Only the best proposal
            is checked; if its outputs are not finite, it counts as failed, and the next one is checked.
    """
    known: dict[tuple[bytes, tuple[int, ...]], HeldOutLosses] = {}

    def seen(proposal: Proposal) -> HeldOutLosses:
        key = _key(proposal)
        if key not in known:
            known[key] = seen_of(proposal)
        return known[key]

    def advantage(standard: Proposal, other: Proposal) -> "Advantage":
        predicted = (float(problem.cost[problem.flat(own.choice)].sum()) for own in (standard, other))
        return Advantage.of(seen(standard), seen(other), *predicted)

    tried = [proposal for proposal in first if problem.evaluate(proposal.choice).feasible]
    base_choice = next((attempt for attempt in tried if attempt.name == base), tried[0])
    rivals = [] if timed else [own for own in tried if own.name.startswith((ADDITIVE, UNIFORM))]
    for proposal in sorted(_different(tried), key=lambda candidate: seen(candidate).mean)[:MOST_NEAREST]:
        tried.extend(rounded_to_nearest(measurement, proposal))
    everything = list(map(_named_by_all, _alike(tried)))
    while True:
        standard = functools.reduce(lambda old, new: new if advantage(old, new).mean > 0 else old, rivals, base_choice)
        if not np.isfinite(seen(standard).mean):
            standard = min(everything, key=lambda item: seen(item).mean)
        alike = next(item for item in everything if _key(item) == _key(standard))
        clear = [item for item in everything if advantage(standard, item).is_clear]
        best = max([alike, *clear], key=lambda item: advantage(standard, item).mean)
        if not np.isfinite(seen(best).mean) or is_finite(best):
            break
        known[_key(best)] = HeldOutLosses.failed()
    undecided = [item for item in everything if seen(item).mean < seen(best).mean]

    def figures(proposal: Proposal) -> Candidate:
        judged = problem.evaluate(proposal.choice)
        return Candidate(proposal.name, judged.objective, seen(proposal).mean, judged.usage)

    return Guarded(
        best=best,
        candidates=tuple(figures(item) for item in everything if item not in undecided),
        undecided=tuple(map(figures, undecided)),
        error=seen(best).error,
    )


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


class Advantage(NamedTuple):
    """Relative difference of the losses of two choices, positive if the second is better: posterior mean and error."""

    mean: float
    error: float

    @property
    def is_clear(self) -> bool:
        """Whether the second choice is clearly better."""
        return self.mean > CONFIDENCE * self.error

    @classmethod
    def of(
        cls, standard: HeldOutLosses, other: HeldOutLosses, predicted_standard: float, predicted_other: float
    ) -> "Advantage":
        """Return the advantage of ``other``, from held-out and predicted losses of both.

        >>> rng = np.random.default_rng(0)
        >>> losses = rng.lognormal(size=64)
        >>> standard, lower, noisy = map(HeldOutLosses.of, (losses, 0.8 * losses, 0.9 * rng.permutation(losses)))
        >>> Advantage.of(standard, lower, 1.0, 1.0).is_clear, Advantage.of(standard, noisy, 1.0, 1.0).is_clear
        (True, False)
        """
        if not (np.isfinite(standard.mean) and np.isfinite(other.mean)):
            return cls(float(np.isfinite(other.mean)) - float(np.isfinite(standard.mean)), 0.0)
        expected = _relative(predicted_standard, predicted_other, abs(predicted_standard) + abs(predicted_other))
        size = float(np.abs(standard.samples).mean() + np.abs(other.samples).mean())
        seen = _relative(standard.samples, other.samples, size)
        error = standard_error(seen)
        precisions = np.array([0.0 if error is None else 1.0 / (error**2 + RESOLUTION**2), 1.0 / PRIOR**2])
        mean = float(precisions @ [seen.mean(), expected.mean()] / precisions.sum())
        return cls(mean, float(precisions.sum() ** -0.5))


def _relative(standard: ArrayLike, other: ArrayLike, size: float) -> NDArray[np.float64]:
    """Return differences relative to the mean of both sizes, whose sum is ``size``."""
    return np.subtract(standard, other, dtype=np.float64) * (2.0 / size if size else 0.0)


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
        self._data, self._forward = data, steady(forward)
        self._given_forward = forward  # a steady one restores running statistics
        self._batch_norm_data, self._rounding = batch_norm_data, rounding

    def __call__(self, proposal: Proposal) -> HeldOutLosses:
        """Return the losses of a proposal."""
        try:
            with self._chosen(proposal) as choice:
                return HeldOutLosses.of(self._true_loss.by_sample(choice))
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
