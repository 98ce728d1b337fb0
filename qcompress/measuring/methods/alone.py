"""Measure the true loss increase of single options, each applied alone to a model in memory; see `reruns`."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.errors import NotFiniteError
from qcompress.measuring.candidates import Candidates
from qcompress.measuring.methods.gradient_check import widened
from qcompress.measuring.methods.reruns import sample_places
from qcompress.measuring.methods.rounded import rounded
from qcompress.model import forward as forwards
from qcompress.model.batches import as_float32, samples
from qcompress.model.losses import Loss


def samples_to_run(batches: Iterable[Any], num_batches: int, count: int) -> Iterator[Any]:
    """Yield the samples to run options on.

    Args:
        batches: the data.
        num_batches: number of batches that were measured.
        count: number of samples in them, or of batches if these were not taken apart.
    """
    wanted, number = set(sample_places(count)), 0
    for batch in islice(batches, num_batches):
        for sample in samples(batch) if count > num_batches else (batch,):
            if number in wanted:
                yield sample
            number += 1


@torch.no_grad()
def rises_alone(
    model: nn.Module,
    candidates: Candidates,
    loss: Loss,
    forward: forwards.Forward,
    chosen: Iterable[Any],
    runs: Sequence[int],
) -> tuple[NDArray[np.float64], list[int]] | None:
    """Return ``(runs, samples)`` loss increases, NaN where not finite, and the number of output rows of each sample.

    A model in half precision is run in float32; if that fails, return None.

    Args:
        model: the original model.
        candidates: options of its parts.
        loss: the loss.
        forward: how to run a batch.
        chosen: the samples to run, each as a batch.
        runs: the (flat) options to run.
    """
    parts = (np.searchsorted(candidates.offsets, runs, side="right") - 1).tolist()
    options = [flat - int(candidates.offsets[part]) for part, flat in zip(parts, runs, strict=True)]

    def rise(part: int, option: int, sample: Any, reference: Tensor) -> float:
        try:
            with candidates.applied(part, option):
                output = forwards.run(model, sample, forward)
        except NotFiniteError:
            return np.nan
        return float(loss.rise(output, reference, sample).mean())

    rises: list[list[float]] = []
    sizes: list[int] = []
    references: list[Tensor] = []
    weights = [layer.site(model).weight for layer in candidates.layers]
    with forwards.layer_by_layer(), widened(model) as wide:
        for batch in chosen:
            sample, in_half = as_float32(batch) if wide else batch, False
            refer = partial(_append_output, references, model, sample, forward)
            try:
                if rises:
                    refer()
                else:
                    _, in_half = rounded(refer, weights)
            except Exception as error:
                if not wide or forwards.is_out_of_memory(error):
                    raise
                return None
            if in_half:
                return None
            reference = references.pop()
            rises.append([rise(*run, sample, reference) for run in zip(parts, options, strict=True)])
            sizes.append(len(reference))
    return np.array(rises).T, sizes


def _append_output(outputs: list[Tensor], model: nn.Module, sample: Any, forward: forwards.Forward) -> None:
    outputs.append(forwards.run(model, sample, forward))
