"""Calibration: which model is looked at, on which data, run how, and by which loss."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qcompress.errors import OptionsError
from qcompress.identity import Identity, identify, identify_batches
from qcompress.model import forward as forwards
from qcompress.model.losses import Loss


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """What every measured number depends on.

    Attributes:
        model: the original.
        data: re-iterable batches.
        forward: ``(model, batch) -> output tensor``, or None for `qcompress.model.forward.default_forward`.
        loss: relative to the original's outputs.
        seed: of shuffled data and of whatever is drawn.

    Raises:
        DataError: the data can be read only once.
        OptionsError: a seed that is no whole number from 0.
    """

    model: nn.Module
    data: Iterable[Any]
    forward: forwards.Forward | None
    loss: Loss
    seed: int

    def __post_init__(self) -> None:
        forwards.checked_data(self.data)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise OptionsError(f"seed must be a whole number from 0, found {self.seed!r}")

    def first_batch(self) -> Any:
        """The first batch.

        Raises:
            DataError: there is none.
        """
        return forwards.first_batch(self.data)

    def identities(self) -> dict[str, Identity]:
        """Name → identity of everything in it; reads all the data once, shuffled as the seed says."""
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(self.seed)
            data = identify_batches(self.data)
        return {
            "model": identify(self.model, "model"),
            "data": data,
            "forward": identify(self.forward, "forward"),
            "loss": identify(self.loss, "loss"),
            "seed": identify(self.seed),
        }
