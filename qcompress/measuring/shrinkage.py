"""Second moments of a layer's inputs, shrunk as far as few samples require.

Least squares on second moments fits their chance as well. A layer with 1,536 inputs that saw 1,600 words can make up
for almost anything there, and for little of it on other words: its removals then seem to cost nothing. Therefore the
moments get a multiple of the identity. It is chosen by reconstructing the layer without half of its inputs from one
half of the samples, for the other half. With many samples nothing is added.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qcompress.compressed.reconstruction import DAMPING, DAMPINGS, Reader, readers, reconstruct
from qcompress.errors import DataError
from qcompress.measuring.inputs.moments import second_moments
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.calibration import Calibration
from qcompress.model.coupled import CoupledSet
from qcompress.model.parts import Part


def shrunk(
    calibration: Calibration,
    run: forwards.Forward,
    parts: Sequence[Part],
    sets: Sequence[CoupledSet],
    moments: Mapping[str, Tensor],
    num_inputs: Mapping[str, int],
) -> dict[str, Tensor]:
    """Return the moments of layers that read a set, with a multiple of the identity.

    Args:
        calibration: model and data.
        run: how to run a batch.
        parts: these layers.
        sets: coupled sets of the model.
        moments: second moments of their inputs over all samples, by path.
        num_inputs: numbers of inputs that these are averaged over.
    """
    model, half = calibration.model, half_of(calibration.data)
    if half is None or not parts:
        return {}
    try:
        first, first_inputs = second_moments(model, parts, half, run)
    except DataError:  # half of the data does not reach every layer
        return {}
    result: dict[str, Tensor] = {}
    for item in sets:
        for reader in readers(model, item):
            path = reader.path
            left = num_inputs.get(path, 0) - first_inputs.get(path, 0)
            if path in first and left > 0 and moments[path].ndim == 2:
                second = (moments[path] * num_inputs[path] - first[path] * first_inputs[path]) / left
                result[path] = _more(moments[path], _best(model, reader, (first[path], second)))
    return result


def half_of(data: Iterable[Any]) -> list[Any] | None:
    """Return every second batch; of a single batch every second sample; None if that is impossible.

    >>> half_of([torch.tensor([[1], [2], [3]])])
    [tensor([[1],
            [3]])]
    """
    batches = list(data)
    if len(batches) > 1:
        return batches[::2]
    lengths = {len(value) for value in tree_leaves(batches) if isinstance(value, Tensor) and value.ndim}
    if len(lengths) != 1 or max(lengths) < 2:
        return None
    taken: list[Any] = tree_map(
        lambda value: value[::2] if isinstance(value, Tensor) and value.ndim else value, batches
    )
    return taken


def _best(model: nn.Module, reader: Reader, halves: Sequence[Tensor]) -> float:
    """Return the damping with the least error on the half that is not fitted to."""
    module = model.get_submodule(reader.path)
    rows = layers.to_rows(module, layers.weight_of(module).detach()).cpu().double()
    units = np.random.default_rng(0).permutation(len(reader.columns))[: len(reader.columns) // 2]
    gone = torch.from_numpy(np.sort(reader.columns[units].ravel()))

    def error(damping: float) -> float:
        total = 0.0
        for own, other in (halves, halves[::-1]):
            change = rows - reconstruct(rows, _more(own, damping), gone)
            total += float(((change @ other.double()) * change).sum())
        return total

    return min(DAMPINGS, key=error)


def _more(moments: Tensor, damping: float) -> Tensor:
    """Return moments that `reconstruct` damps by ``damping`` in all."""
    added = (damping - DAMPING) * float(moments.diagonal().mean())
    return moments + torch.eye(len(moments), dtype=moments.dtype) * added
