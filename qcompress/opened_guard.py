"""Losses of several choices in an opened model: all choices go through a block together while it is in memory."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from qcompress.guard import HeldOutLosses
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import EncodeProgress
from qcompress.model import forward as forwards
from qcompress.model.losses import Loss
from qcompress.proposals import Proposal
from qcompress.streaming.losses import Choice, losses_of


class OpenedKeptLoss:
    """Losses of proposals on held-out batches, as `qcompress.guard.KeptLoss` for an opened model.

    Args:
        model: the original, opened model.
        measurement: the measurement that the proposals choose from.
        kept: the held-out batches.
        data: calibration batches that compensated codes are fitted to.
        loss: same as in `measure`.
        forward: same as in `measure`.
        first: proposals that are evaluated together as soon as the loss of one of them is requested.
        on_encode: called after every block has been encoded and run.
    """

    def __init__(
        self,
        model: nn.Module,
        measurement: Measurement,
        kept: Iterable[Any],
        data: Iterable[Any],
        *,
        loss: Loss,
        forward: forwards.Forward | None = None,
        first: Sequence[Proposal] = (),
        on_encode: Callable[[EncodeProgress], None] | None = None,
    ) -> None:
        self._model, self._measurement, self._kept, self._data = model, measurement, kept, data
        self._loss, self._forward, self._waiting = loss, forward, list(first)
        self._on_encode = on_encode
        self._seen: dict[Choice, HeldOutLosses] = {}

    def __call__(self, proposal: Proposal) -> HeldOutLosses:
        """Return the losses of a proposal; infinite if the model's output is not finite."""
        choice = self._transforms(proposal)
        if choice not in self._seen:
            choices = list(dict.fromkeys([choice, *map(self._transforms, self._waiting)]))
            self._waiting = []
            new = [candidate for candidate in choices if candidate not in self._seen]
            losses = losses_of(
                self._model, self._measurement, new, self._kept, self._data, loss=self._loss, forward=self._forward,
                on_encode=self._on_encode,
            )  # fmt: skip
            seen = (HeldOutLosses.failed() if own is None else HeldOutLosses.of(own) for own in losses)
            self._seen |= dict(zip(new, seen, strict=True))
        return self._seen[choice]

    def _transforms(self, proposal: Proposal) -> Choice:
        return tuple(
            options[option].nearest if part in proposal.nearest else options[option]
            for part, (options, option) in enumerate(
                zip(self._measurement.transforms, proposal.choice.tolist(), strict=False)
            )
        )
