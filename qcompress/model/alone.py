"""Whether samples run alone have the outputs and losses that they have within their batch, up to rounding."""

from typing import Any

import torch
from torch import Tensor, nn

from qcompress.model.losses import Loss

SAME_OUTPUT = 1e-3
"""Tolerance relative to the largest output: another batch size may use other kernels, which round differently."""


def precision_of(model: nn.Module) -> float:
    """Return the relative precision of the coarsest of a model's dtypes; 0 without a parameter."""
    own = (torch.finfo(parameter.dtype).eps for parameter in model.parameters() if parameter.is_floating_point())
    return max(own, default=0.0)


def same_outputs(model: nn.Module, actual: Tensor, expected: Tensor) -> bool:
    """Whether outputs are equal up to rounding in the coarsest of the model's dtypes; infinities must be equal.

    >>> logits, layer = torch.tensor([1.0, -torch.inf]), nn.Linear(1, 1)
    >>> same_outputs(layer, logits + 1e-5, logits), same_outputs(layer, torch.zeros(2), logits)
    (True, False)
    """
    finite = expected.isfinite()
    if actual.shape != expected.shape or not torch.equal(actual[~finite], expected[~finite]):
        return False
    far = max(SAME_OUTPUT, 16 * precision_of(model)) * torch.where(finite, expected, 0.0).abs().max()
    return bool(((actual - expected)[finite].abs() <= far).all())


def same_losses(
    model: nn.Module, loss: Loss, part: tuple[Any, Tensor], whole: tuple[Any, Tensor], chosen: Tensor | slice
) -> bool:
    """Whether samples alone have the same losses as within their batch.

    Args:
        model: the model, for the precision of its outputs.
        loss: the loss.
        part: some samples of a batch and their outputs.
        whole: the batch and its outputs.
        chosen: which rows of the outputs of the whole batch are those of the part.

    Returns:
        False also if the loss does not accept a part of the batch.
    """
    expected = loss.values(whole[1], whole[0])
    if expected is None:
        return True
    try:
        actual = loss.values(part[1], part[0])
    except Exception:  # the caller's code may raise anything for a part of what it needs
        return False
    rows = chosen.to(expected.device) if isinstance(chosen, Tensor) else chosen
    return actual is not None and same_outputs(model, actual, expected[rows])
