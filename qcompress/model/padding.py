"""Padding: positions of a batch that hold no words, which count in no loss and in no statistics of inputs.

A mapping may hold an ``attention_mask`` ``(samples, positions)``, 1 at real positions and 0 at padded ones. Where a
model's outputs or a layer's inputs are ``(samples, positions, …)``, the padded ones are left out: a sample's loss is
the mean over its real positions, as it would be without padding. An encoder with a decoder has its outputs at the
positions of ``decoder_attention_mask``; all inputs of its layers count, as they may be of either side.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import DataError
from qcompress.model import layers
from qcompress.model.decoder_inputs import DECODER, MASK, has_decoder
from qcompress.model.losses import Loss


class AllPaddingError(DataError):
    """A sample without a real position."""


@contextlib.contextmanager
def padding_named(data: Iterable[Any], name: str = "data") -> Iterator[None]:
    """Add to an `AllPaddingError` inside the block where in the data called ``name`` it was raised.

    A pass may be over a part of a batch, or over batches made from the caller's, and the error inside knows no more.
    """
    try:
        yield
    except AllPaddingError:
        for number, batch in enumerate(data):
            mask = batch.get(_mask_name(batch)) if isinstance(batch, Mapping) else None
            if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.any(dim=1).all()):
                sample = int((~mask.any(dim=1)).nonzero()[0])
                raise AllPaddingError(
                    f"sample {sample} of batch {number} of {name}, counted from 0, is all padding: its "
                    f"{_mask_name(batch)} is 0 everywhere"
                ) from None
        raise


def real_positions(batch: Any, output: Tensor) -> Tensor | None:
    """Return which positions of a model's output ``(samples, positions, …)`` are real, as booleans; None if all are.

    All positions of an output of another shape count as real.

    Raises:
        DataError: a sample has no real position.

    >>> batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    >>> real_positions(batch, torch.zeros(2, 3, 5))
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    >>> real_positions(batch, torch.zeros(2, 5)) is None
    True
    """
    if not isinstance(batch, Mapping) or output.ndim < 3:
        return None
    return _real(batch.get(_mask_name(batch)), output)


def at_real_positions(batch: Any, output: Tensor) -> Tensor:
    """Return a model's output at the real positions, ``(real positions, …)``; the output itself if all are real."""
    real = real_positions(batch, output)
    return output if real is None else output[real]


def real_inputs(batch: Any, module: nn.Module, given: Tensor) -> Tensor | None:
    """Return which positions of a layer's input are real, as booleans ``(samples, positions)``; None if all are.

    The input is ``(samples, positions, features)`` of a linear layer, or ``(samples, positions)`` of an embedding. If
    it is flattened, to one row per position of one sample after the other, the result is ``(samples · positions,)``.

    Raises:
        DataError: a sample has no real position.
    """
    if not isinstance(batch, Mapping) or has_decoder(batch) or given.is_nested:
        return None
    linear = layers.kind_of(module) is nn.Linear or layers.has_inputs_first(module)
    if not linear and not isinstance(module, nn.Embedding):
        return None
    mask, apart = batch.get(MASK), 3 if linear else 2
    if given.ndim == apart:
        return _real(mask, given)
    if given.ndim != apart - 1 or not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    if mask.shape[1] == 1 or len(given) != mask.numel():
        return None
    real = _real(mask, given.view(*mask.shape, *given.shape[1:]))
    return None if real is None else real.flatten()


def _mask_name(batch: Mapping[str, Any]) -> str:
    return f"{DECODER}{MASK}" if has_decoder(batch) else MASK


def _real(mask: Any, values: Tensor) -> Tensor | None:
    if not isinstance(mask, Tensor) or mask.ndim != 2 or values.shape[:2] != mask.shape:
        return None
    real = mask == 1
    if not bool(((mask == 0) | (mask == 1)).all()) or bool(real.all()):
        return None
    if not bool((some := real.any(dim=1)).all()):
        sample = int((~some).nonzero()[0])
        raise AllPaddingError(f"sample {sample} of a batch is all padding: its {MASK} is 0 everywhere")
    return real.to(values.device)


class OverRealPositions(Loss):
    """A loss that is a mean over positions, taken over the real positions of each sample.

    Args:
        loss: a loss of outputs ``(samples, positions, …)`` that is a mean over positions of what depends on the outputs
            at one position alone.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss, self.name, self.curvature_varies = loss, loss.name, loss.curvature_varies

    @property
    def softened(self) -> Loss | None:
        """The same of the softened loss."""
        softened = self._loss.softened
        return None if softened is None else OverRealPositions(softened)

    def guesses_dim(self, output: Tensor) -> bool:
        """Same as of the loss."""
        return self._loss.guesses_dim(output)

    def ignores_shifts(self, output: Tensor) -> bool:
        """Same as of the loss."""
        return self._loss.ignores_shifts(output)

    def takes_probabilities(self, output: Tensor) -> bool:
        """Same as of the loss."""
        return self._loss.takes_probabilities(output)

    def require(self, output: Tensor, batch: Any) -> None:
        """Check the same as the loss."""
        self._loss.require(output, batch)

    def doubt(self, output: Tensor, batch: Any) -> float | None:
        """Sum over the real positions."""
        real = real_positions(batch, output)
        return self._loss.doubt(output if real is None else output[real], batch)

    def rise(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:
        """Return ``(samples,)``: means over real positions."""
        return self.rise_by_position(output, reference, batch).mean(dim=1)

    def rise_by_position(self, output: Tensor, reference: Tensor, batch: Any) -> Tensor:
        """Return ``(samples, positions)``: 0 at padding, the rest scaled so that the mean is the sample's loss."""
        weights = _weights(batch, output)
        if weights is None:
            return self._loss.rise_by_position(output, reference, batch)
        unchanged = torch.where(_along(weights, output) > 0, output, reference)
        by_position = self._loss.rise_by_position(unchanged, reference, batch)
        return by_position * (weights if by_position.shape == weights.shape else weights.amax(dim=1, keepdim=True))

    def effects(self, changes: Tensor, point: Tensor, batch: Any) -> Tensor:
        """Return the loss's effects times the roots of the positions' weights."""
        return _scaled(self._loss.effects(changes, point, batch), point, batch)

    def probes(self, reference: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """Return the loss's probes times the roots of the positions' weights."""
        return _scaled(self._loss.probes(reference, batch, generator), reference, batch)

    def probe(self, point: Tensor, batch: Any, generator: torch.Generator) -> Tensor:
        """Return the loss's probe times the roots of the positions' weights."""
        return _scaled(self._loss.probe(point, batch, generator), point, batch)

    def gradient(self, point: Tensor, batch: Any, reference: Tensor | None = None) -> Tensor | None:
        """Return the loss's gradient times the positions' weights."""
        gradient, weights = self._loss.gradient(point, batch, reference), _weights(batch, point)
        return gradient if gradient is None or weights is None else gradient * _along(weights, point)


def _weights(batch: Any, output: Tensor) -> Tensor | None:
    """Return the weight of every position ``(samples, positions)``, of mean 1 over a sample's positions."""
    real = real_positions(batch, output)
    if real is None:
        return None
    return real.to(output.dtype) * (real.shape[1] / real.sum(dim=1, keepdim=True))


def _along(weights: Tensor, output: Tensor) -> Tensor:
    """Return the weights in a shape that multiplies outputs."""
    return weights.view(*weights.shape, *(1,) * (output.ndim - 2))


def _scaled(values: Tensor, output: Tensor, batch: Any) -> Tensor:
    """Multiply values ``(…, *output.shape)`` by the roots of the positions' weights."""
    weights = _weights(batch, output)
    return values if weights is None else values * _along(weights.sqrt(), output)
