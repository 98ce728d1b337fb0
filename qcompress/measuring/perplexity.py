"""How well a language model predicts the next token."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.measuring.streamed.sweep import swept_outputs
from qcompress.model import forward as forwards
from qcompress.model.opened import opened_of
from qcompress.model.steady import steady


def perplexity(model: nn.Module, windows: Sequence[Tensor]) -> float:
    """``exp`` of the mean negative log likelihood of every token but the first of each window.

    Args:
        model: maps tokens ``(windows, length)`` to logits ``(windows, length, vocabulary)``; an opened model processes
            all windows block by block.
        windows: tokens.

    >>> class Even(nn.Module):
    ...     def forward(self, tokens):
    ...         return torch.zeros(*tokens.shape, 8)
    >>> round(perplexity(Even(), [torch.tensor([[1, 2, 3]])]), 6)
    8.0
    """
    total, count = 0.0, 0
    with torch.no_grad(), forwards.evaluating(model):
        if opened_of(model) is not None:
            with swept_outputs(model, windows, steady(None)) as outputs:
                total, count = _added(outputs)
        else:
            total, count = _added((window, forwards.run(model, window)) for window in windows)
    return math.exp(total / count)


def _added(outputs: Iterable[tuple[Any, Tensor]]) -> tuple[float, int]:
    """Return the sum of the negative log likelihoods, and the number of tokens."""
    total, count = 0.0, 0
    for window, logits in outputs:
        wanted = window[:, 1:].to(logits.device)
        log_p = logits[:, :-1].double().log_softmax(-1).gather(-1, wanted[..., None])
        total, count = total - float(log_p.sum()), count + wanted.numel()
    return total, count
