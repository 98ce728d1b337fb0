"""The guard: of a few choices made in different ways, the one that truly loses least on samples kept aside.

A proof says that no choice is predicted to lose less; what the prediction is worth is seen by running the model on
samples that nothing was measured on or fitted to. Tried are the proposals of `qcompress.proposals`, and the best of
them rounded to nearest where codes were compensated. What always holds: all of them are within the budgets, the one
that comes back has the least loss there, and of equals it is the first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from formulations import FileFormatError, Problem
from formulations.files import AnyPath, read_json, write_json
from qcompress.errors import ModelError
from qcompress.measurement import Measurement
from qcompress.measuring.true_loss import TrueLoss
from qcompress.model import forward as forwards
from qcompress.model.batch_norm import reestimate_
from qcompress.model.losses import Loss, LossFunction
from qcompress.proposals import Proposal, rounded_to_nearest

MOST_NEAREST = 2
"""Choices that are tried rounded to nearest: the best of those before."""

FILE_KIND = "qcompress guard"
FILE_VERSION = 1


class Candidate(NamedTuple):
    """A choice that was tried: predicted loss, true loss on the samples kept aside, resource → use."""

    name: str
    loss_predicted: float
    loss_validation: float
    usage: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guarded:
    """The proposal that loses least, and all that were tried, in the order they were."""

    best: Proposal
    candidates: tuple[Candidate, ...]

    @property
    def won(self) -> Candidate:
        """The figures of the best."""
        return next(candidate for candidate in self.candidates if candidate.name == self.best.name)

    def save(self, path: AnyPath) -> None:
        """Write it as JSON, whole or not at all."""
        best = {"name": self.best.name, "choice": self.best.choice.tolist(), "nearest": list(self.best.nearest)}
        candidates = [candidate._asdict() for candidate in self.candidates]
        write_json(path, {"kind": FILE_KIND, "version": FILE_VERSION, "best": best, "candidates": candidates})

    @classmethod
    def load(cls, path: AnyPath) -> "Guarded":
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is no such JSON.
        """
        value = read_json(path, FILE_KIND)
        try:
            best = value["best"]
            return cls(
                best=Proposal(
                    name=best["name"],
                    choice=np.array(best["choice"], dtype=np.int64),
                    nearest=tuple(best["nearest"]),
                ),
                candidates=tuple(Candidate(**candidate) for candidate in value["candidates"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} is no whole {FILE_KIND} file: {error!r}") from error


def guard(
    measurement: Measurement, problem: Problem, first: Iterable[Proposal], true_loss: Callable[[Proposal], float]
) -> Guarded:
    """Try proposals, then the best of them rounded to nearest, and take the best of all.

    Args:
        measurement: what the problem was made from.
        problem: which judges budgets and predicts.
        first: what to try; what is over budget is left out. See `proposals`.
        true_loss: the loss of a proposal on samples that nothing was fitted to.
    """
    losses: dict[tuple[bytes, tuple[int, ...]], float] = {}
    tried: list[Proposal] = []

    def loss_of(proposal: Proposal) -> float:
        key = proposal.choice.tobytes(), proposal.nearest
        if key not in losses:
            losses[key] = true_loss(proposal)
        return losses[key]

    tried.extend(proposal for proposal in first if problem.evaluate(proposal.choice).feasible)
    different = {proposal.choice.tobytes(): proposal for proposal in reversed(tried)}.values()
    for proposal in sorted(different, key=loss_of)[:MOST_NEAREST]:
        tried.extend(rounded_to_nearest(measurement, proposal))
    judged = [(proposal, problem.evaluate(proposal.choice)) for proposal in tried]
    return Guarded(
        best=min(tried, key=loss_of),
        candidates=tuple(
            Candidate(proposal.name, found.objective, loss_of(proposal), found.usage) for proposal, found in judged
        ),
    )


def kept_loss(
    model: nn.Module,
    measurement: Measurement,
    kept: Iterable[Any],
    *,
    loss: str | LossFunction | Loss = "kl",
    forward: forwards.Forward | None = None,
    batch_norm_data: Iterable[Any] | None = None,
) -> Callable[[Proposal], float]:
    """The true loss of proposals on batches kept aside; infinite where the model's output is no longer finite.

    Args:
        model: the original; left as it is.
        measurement: what the proposals choose from.
        kept: the batches.
        loss: as of `measure`.
        forward: as of `measure`.
        batch_norm_data: as of `qcompress.apply`, for every proposal anew.
    """
    options = [[*own, *(item.nearest for item in own)] for own in measurement.transforms]
    wider = replace(measurement, transforms=tuple(map(tuple, options)))
    true_loss = TrueLoss(model, wider, kept, loss=loss, forward=forward)

    def lost(proposal: Proposal) -> float:
        choice = proposal.choice[: len(options)].copy()
        for part in proposal.nearest:
            choice[part] += len(options[part]) // 2
        try:
            if batch_norm_data is not None:
                true_loss.emulation.put(choice)
                reestimate_(true_loss.emulation.model, batch_norm_data, forward)
            return true_loss(choice)
        except ModelError:  # what a choice does to the model is what is asked
            return float("inf")

    return lost
