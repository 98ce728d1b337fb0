"""The true loss of a changed model, or of any choice, by running it."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from qcompress.compressed.emulation import Emulation
from qcompress.errors import DataError, ModelError, NotFiniteError, ResultNotFiniteError
from qcompress.measurement import Measurement
from qcompress.measuring.streamed.sweep import swept_outputs
from qcompress.model import forward as forwards
from qcompress.model.losses import CallableLoss, Loss, LossFunction, as_loss
from qcompress.model.opened import opened_of
from qcompress.model.padding import padding_named
from qcompress.model.steady import steady


def mean_loss(
    original: nn.Module,
    changed: nn.Module,
    data: Iterable[Any],
    *,
    loss: str | LossFunction | Loss = "kl",
    forward: forwards.Forward | None = None,
) -> float:
    """Return the true mean loss increase per sample of ``changed`` against ``original`` over ``data``.

    Both models draw the same random numbers, if any, and start every batch from their current buffers.

    Raises:
        DataError: there is no sample, or the original does not accept a batch.
        ModelError: one of the arguments is not a model, or the loss cannot compare the outputs.
    """
    return float(sample_losses(original, changed, data, loss=loss, forward=forward).mean())


def sample_losses(
    original: nn.Module,
    changed: nn.Module,
    data: Iterable[Any],
    *,
    loss: str | LossFunction | Loss = "kl",
    forward: forwards.Forward | None = None,
) -> NDArray[np.float64]:
    """Return ``(samples,)`` true loss increases, whose mean is `mean_loss`; arguments and errors are the same."""
    run, measured = steady(forward), as_loss(loss)
    forwards.require_iterable(data, "data")
    forwards.require_samples_in(data, "data")
    rises = []
    with paired_outputs(original, changed, data, run) as outputs:
        for batch, before, after in outputs:
            if before.shape != after.shape and not isinstance(measured, CallableLoss):
                raise ModelError(
                    f"loss {measured.name!r} compares outputs of one shape, found {tuple(before.shape)} of the "
                    f"original and {tuple(after.shape)} of the other model"
                )
            rises.append(measured.rise(after, before, batch))
    if not any(map(len, rises)):
        raise DataError(
            "the data holds no sample to compute the loss on: it is empty, or an iterator that is already exhausted"
        )
    return torch.cat(rises).double().cpu().numpy()


def standard_error(losses: NDArray[np.float64]) -> float | None:
    """Return the standard error of the mean of ``(samples,)`` losses; None for fewer than two or if any is not finite.

    >>> standard_error(np.array([1.0, 3.0]))
    1.0
    """
    if len(losses) < 2 or not np.isfinite(losses).all():
        return None
    return float(losses.std(ddof=1) / len(losses) ** 0.5)


@contextlib.contextmanager
def paired_outputs(
    original: nn.Module, changed: nn.Module, data: Iterable[Any], run: forwards.Forward
) -> Iterator[Iterator[tuple[Any, Tensor, Tensor]]]:
    """Yield every batch, or sample of an opened model, with the outputs of both models.

    Opened models are run once, block by block, and only one sample's outputs are in memory.
    """
    for name, model in (("original", original), ("changed", changed)):
        forwards.require_module(model, name)
    if opened_of(original) is not None and opened_of(changed) is not None:
        with (
            padding_named(data),
            swept_outputs(original, data, run) as before,
            swept_outputs(changed, data, run) as after,
        ):
            yield ((batch, old, new) for (batch, old), (_, new) in zip(before, after, strict=True))
    else:
        with (
            padding_named(data),
            forwards.evaluating(original),
            forwards.evaluating(changed),
            torch.no_grad(),
        ):
            yield ((batch, _output(original, batch, run), _changed_output(changed, batch, run)) for batch in data)


def _output(model: nn.Module, batch: Any, run: forwards.Forward) -> Tensor:
    with forwards.first_pass(batch, "a batch"):
        return forwards.run(model, batch, run)


def _changed_output(model: nn.Module, batch: Any, run: forwards.Forward) -> Tensor:
    try:
        return _output(model, batch, run)
    except NotFiniteError as error:
        raise ResultNotFiniteError(
            f"the outputs of the compressed model for a batch ({forwards.described(batch)}) hold NaN or infinity, "
            "those of the original do not: its domain ends near this batch; ask for a larger budget or milder options"
        ) from error


class TrueLoss:
    """True mean loss increase of choices, by running the model: the ``measure`` of ``solvers.beam.beam_search``.

    Args:
        model, measurement: same as in `Emulation`.
        data: batches, kept in memory with the original's outputs.
        loss, forward, original: same as in `measure`.

    Attributes:
        emulation: the model that choices are applied to.
        data: the batches.
        loss: the loss.

    Low-rank layers are run as dense layers with the product of their factors, so the loss equals that of the
    compressed model up to rounding.

    >>> from qcompress import formulate, measure, prune_quantize
    >>> from solvers import beam_search
    >>> _ = torch.manual_seed(0)
    >>> model, data = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), [torch.randn(32, 8)]
    >>> measurement = measure(model, data, prune_quantize(bits=(4, 8), sparsity=(0,)))
    >>> true_loss = TrueLoss(model, measurement, data)
    >>> true_loss([0, 0])
    0.0
    >>> found = beam_search(formulate(measurement, {"bytes": 0.4}), true_loss)
    >>> found.loss == true_loss(found.choice)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        measurement: Measurement,
        data: Iterable[Any],
        *,
        loss: str | LossFunction | Loss = "kl",
        forward: forwards.Forward | None = None,
        original: nn.Module | None = None,
    ) -> None:
        self.emulation, self.loss = Emulation(model, measurement), as_loss(loss)
        self._forward = steady(forward)
        self.data = list(forwards.checked_data(data))
        forwards.first_batch(self.data)
        goal = self.emulation.model if original is None else original
        with forwards.evaluating(goal), torch.no_grad():
            self._references = [_output(goal, batch, self._forward) for batch in self.data]

    def __call__(self, choice: ArrayLike) -> float:
        """Return the mean loss increase per sample; infinite if an output or a loss is not finite."""
        try:
            mean = float(self.by_sample(choice).mean())
        except NotFiniteError:
            return math.inf
        return mean if math.isfinite(mean) else math.inf

    def by_sample(self, choice: ArrayLike) -> NDArray[np.float64]:
        """Return ``(samples,)`` loss increase of every sample."""
        self.emulation.put(choice)
        rises: list[NDArray[np.float64]] = []
        with padding_named(self.data), forwards.evaluating(self.emulation.model), torch.no_grad():
            for batch, reference in zip(self.data, self._references, strict=True):
                output = forwards.run(self.emulation.model, batch, self._forward)
                rises.append(self.loss.rise(output, reference, batch).double().cpu().numpy())
        return np.concatenate(rises)
