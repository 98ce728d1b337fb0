"""Re-estimate batch-norm statistics, because changed weights shift the inputs of batch normalisation."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qcompress.errors import DataError
from qcompress.model import forward as forwards


def reestimate_(model: nn.Module, data: Iterable[Any], forward: forwards.Forward | None = None) -> None:
    """Set the running mean and variance of every batch-norm layer to their averages over ``data``, in place.

    All batches have the same weight, and nothing else in the model changes. On failure, old statistics are restored.

    Args:
        model: model with or without batch-norm layers; without any, nothing happens.
        data: batches.
        forward: how to run a batch, if `qcompress.model.forward.default_forward` does not fit.

    Raises:
        DataError: there is no batch, or one holds no sample.
        ModelError: the output of the model is not finite.

    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> reestimate_(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
    >>> model[0].running_mean, model[0].running_var
    (tensor([4.]), tensor([2.]))
    """
    forwards.require_samples_in(data, "batch_norm_data")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    before = [(norm, norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    count = 0
    try:
        with forwards.evaluating(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # the plain average over all batches
            for count, batch in enumerate(data, start=1):  # noqa: B007
                with forwards.first_pass(batch, "a batch for batch norms"):
                    forwards.run(model, batch, forward)
        if count == 0:
            raise DataError("no batch to re-estimate batch-norm statistics on: give at least one")
    except BaseException:
        with torch.no_grad():
            for norm, _, buffers in before:
                for name, buffer in norm.named_buffers():
                    buffer.copy_(buffers[name])
        raise
    finally:
        for norm, momentum, _ in before:
            norm.momentum = momentum
