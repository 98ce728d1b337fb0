"""The guard: of a few choices made in different ways, the one that truly loses least on held-out samples.

A proof says that no choice is predicted to lose less; what the prediction is worth is seen by running the model on
samples that nothing was measured on or fitted to. Tried are the proposals of `qcompress.proposals`, and the best of
them rounded to nearest where codes were compensated.

Few held-out samples tell little: losses are heavy-tailed, a handful of samples makes up most of their mean, and of a
dozen choices some look better by chance. So a choice whose loss is below that of the base (the choice by the costs at
softened outputs, without these the additive one, or the refined one) is a candidate only where the difference stands
out from the samples' spread: taken of the fourth roots of the losses, sample by sample (position by position where
outputs have them), its mean is at least `CONFIDENCE` standard errors. The others are told as undecided. What always
holds: all choices are within the budgets, and the one that comes back has the least loss of all candidates; of equals
it is the first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from formulations import Problem
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from qcompress.errors import ModelError
from qcompress.measurement import Measurement
from qcompress.measuring.true_loss import TrueLoss
from qcompress.model import forward as forwards
from qcompress.model.batch_norm import reestimate_
from qcompress.model.losses import Loss, LossFunction
from qcompress.proposals import ADDITIVE, Proposal, rounded_to_nearest

CONFIDENCE = 1.5
"""Standard errors that a difference of losses has to stand out by."""

MOST_NEAREST = 2
"""Choices that are tried rounded to nearest: the best of those before."""

FILE_KIND = FileKind("qcompress guard", version=1)


class Candidate(NamedTuple):
    """A choice that was tried: predicted loss, true loss on the held-out samples, resource → use."""

    name: str
    loss_predicted: float
    loss_validation: float
    usage: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What a choice was seen to lose: the mean per sample, and the loss of every sample and position."""

    mean: float
    each: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guarded:
    """What the guard found.

    Attributes:
        best: the candidate that loses least.
        candidates: what was tried, in that order.
        undecided: what was tried and lost less than the base there, but by no more than chance would have it.
    """

    best: Proposal
    candidates: tuple[Candidate, ...]
    undecided: tuple[Candidate, ...] = ()

    @property
    def won(self) -> Candidate:
        """The figures of the best."""
        return next(candidate for candidate in self.candidates if candidate.name == self.best.name)

    def save(self, path: AnyPath) -> None:
        """Write it as JSON, whole or not at all."""
        best = {"name": self.best.name, "choice": self.best.choice.tolist(), "nearest": list(self.best.nearest)}
        tried = {
            name: [candidate._asdict() for candidate in group]
            for name, group in (("candidates", self.candidates), ("undecided", self.undecided))
        }
        FILE_KIND.write_json(path, {"best": best, **tried})

    @classmethod
    def load(cls, path: AnyPath) -> "Guarded":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is no such JSON.
        """
        value = FILE_KIND.read_json(path)
        with FILE_KIND.building(path):
            best = value["best"]
            return cls(
                best=Proposal(
                    name=best["name"],
                    choice=np.array(best["choice"], dtype=np.int64),
                    nearest=tuple(best["nearest"]),
                ),
                candidates=tuple(Candidate(**candidate) for candidate in value["candidates"]),
                undecided=tuple(Candidate(**candidate) for candidate in value["undecided"]),
            )


def guard(
    measurement: Measurement,
    problem: Problem,
    first: Iterable[Proposal],
    seen_of: Callable[[Proposal], Seen],
    *,
    base: str = ADDITIVE,
) -> Guarded:
    """Try proposals, then the best of them rounded to nearest, and take the best of the candidates.

    Args:
        measurement: what the problem was made from.
        problem: which judges budgets and predicts.
        first: what to try, see `proposals`; what is over budget is left out.
        seen_of: what a proposal loses on samples that nothing was fitted to, see `kept_loss`.
        base: name of the proposal that others have to beat; the first of all where there is none of that name.
    """
    known: dict[tuple[bytes, tuple[int, ...]], Seen] = {}

    def seen(proposal: Proposal) -> Seen:
        key = proposal.choice.tobytes(), proposal.nearest
        if key not in known:
            known[key] = seen_of(proposal)
        return known[key]

    tried = [proposal for proposal in first if problem.evaluate(proposal.choice).feasible]
    standard = seen(next((attempt for attempt in tried if attempt.name == base), tried[0]))
    for proposal in sorted(_different(tried), key=lambda candidate: seen(candidate).mean)[:MOST_NEAREST]:
        tried.extend(rounded_to_nearest(measurement, proposal))
    groups: dict[bool, list[Proposal]] = {True: [], False: []}
    for proposal in map(_named_by_all, _alike(tried)):
        better = seen(proposal).mean < standard.mean
        groups[not better or stands_out(standard, seen(proposal))].append(proposal)

    def figures(proposal: Proposal) -> Candidate:
        judged = problem.evaluate(proposal.choice)
        return Candidate(proposal.name, judged.objective, seen(proposal).mean, judged.usage)

    return Guarded(
        best=min(groups[True], key=lambda candidate: seen(candidate).mean),
        candidates=tuple(map(figures, groups[True])),
        undecided=tuple(map(figures, groups[False])),
    )


def _alike(proposals: Iterable[Proposal]) -> list[list[Proposal]]:
    """Those that come to the same together, in the order of the first of each."""
    groups: dict[tuple[bytes, tuple[int, ...]], list[Proposal]] = {}
    for proposal in proposals:
        groups.setdefault((proposal.choice.tobytes(), proposal.nearest), []).append(proposal)
    return list(groups.values())


def _different(proposals: Iterable[Proposal]) -> list[Proposal]:
    return [first for first, *_ in _alike(proposals)]


def _named_by_all(alike: list[Proposal]) -> Proposal:
    """One of several that come to the same, under all their names."""
    return replace(alike[0], name="; ".join(proposal.name for proposal in alike))


def stands_out(standard: Seen, other: Seen) -> bool:
    """Whether ``other`` loses less than ``standard`` by more than chance.

    >>> rng = np.random.default_rng(0)
    >>> losses = rng.lognormal(size=64)
    >>> standard, lower, noisy = (Seen(mean=1.0, each=each) for each in (losses, 0.9 * losses, rng.permutation(losses)))
    >>> stands_out(standard, lower), stands_out(standard, noisy)
    (True, False)
    """
    if not np.isfinite(standard.mean):
        return bool(np.isfinite(other.mean))
    gain = _fourth_root(standard.each) - _fourth_root(other.each)
    return len(gain) > 1 and bool(gain.mean() > CONFIDENCE * gain.std(ddof=1) / len(gain) ** 0.5)


def _fourth_root(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.sign(losses) * np.abs(losses) ** 0.25)


def kept_loss(
    model: nn.Module,
    measurement: Measurement,
    kept: Iterable[Any],
    *,
    loss: str | LossFunction | Loss = "kl",
    forward: forwards.Forward | None = None,
    batch_norm_data: Iterable[Any] | None = None,
) -> Callable[[Proposal], Seen]:
    """What proposals lose on batches kept aside; infinitely much where the model's output is no longer finite.

    Args:
        model: the original; left as it is.
        measurement: what the proposals choose from.
        kept: the batches.
        loss: as of `measure`.
        forward: as of `measure`.
        batch_norm_data: as of `qcompress.apply`, for every proposal anew.
    """
    options = [
        [*part_transforms, *(item.nearest for item in part_transforms)] for part_transforms in measurement.transforms
    ]
    wider = replace(measurement, transforms=tuple(map(tuple, options)))
    true_loss = TrueLoss(model, wider, kept, loss=loss, forward=forward)

    def seen(proposal: Proposal) -> Seen:
        choice = proposal.choice[: len(options)].copy()
        for part in proposal.nearest:
            choice[part] += len(options[part]) // 2
        try:
            if batch_norm_data is not None:
                true_loss.emulation.put(choice)
                reestimate_(true_loss.emulation.model, batch_norm_data, forward)
            batches = true_loss.by_position(choice)
        except ModelError:  # what a choice does to the model is what is asked
            return Seen(mean=float("inf"), each=np.zeros(0))
        return Seen(
            mean=float(np.concatenate([batch.mean(axis=1) for batch in batches]).mean()),
            each=np.concatenate([batch.ravel() for batch in batches]),
        )

    return seen
