"""Second moments of a layer's inputs, shrunk as far as few samples require.

Least squares also fits the sampling noise of second moments. A layer with 1,536 inputs that saw 1,600 words can
compensate for almost anything on these words, and for little of it on others, so removals seem to cost nothing.
Therefore a multiple of the identity is added to the moments. It is chosen by cross-validation: the layer is
reconstructed without half of its inputs on most of the samples, and the error is measured on the rest. With many
samples nothing is added.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qcompress.compressed.reconstruction import DAMPING, DAMPINGS, FOLDS, Reader, readers, reconstruct
from qcompress.errors import DataError
from qcompress.measuring.inputs.moments import second_moments
from qcompress.model import forward as forwards
from qcompress.model import layers
from qcompress.model.calibration import Calibration
from qcompress.model.coupled import CoupledSet
from qcompress.model.parts import Part

LEAST = 1e-300
"""Added to errors, which may be zero."""


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
    model = calibration.model
    reading = {reader.path: reader for item in sets for reader in readers(model, item)}
    errors: dict[str, list[NDArray[np.float64]]] = {
        path: [] for path in reading if path in moments and moments[path].ndim == 2
    }
    for fold in folds_of(calibration.data) if parts else ():
        try:
            tested, tested_inputs = second_moments(model, parts, fold, run)
        except DataError:  # these samples do not reach every layer: the other folds decide
            continue
        for path in errors:
            count, left = tested_inputs.get(path, 0), num_inputs.get(path, 0) - tested_inputs.get(path, 0)
            if count and left > 0:
                others = (moments[path] * num_inputs[path] - tested[path] * count) / left
                try:
                    found = _errors(model, reading[path], others, tested[path])
                except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                    found = _errors(model, reading[path], _positive(others), tested[path])
                errors[path].append(found)
    return {path: _more(moments[path], _damping(np.array(folds))) for path, folds in errors.items() if len(folds) > 1}


def _damping(errors: NDArray[np.float64]) -> float:
    """Return the best of `DAMPINGS` for errors ``(folds, dampings)``; one above the first must be clearly better.

    Folds count by the logarithm of their error, because one unusual sample makes an error many times as large.
    """
    gains = np.log(errors[:, :1] + LEAST) - np.log(errors + LEAST)
    mean, spread = gains.mean(axis=0), gains.std(axis=0, ddof=1) / len(gains) ** 0.5
    return DAMPINGS[int(np.argmax(np.where(mean > spread, mean, 0.0)))]


def folds_of(data: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield `FOLDS` disjoint parts of the batches; of few batches, of their samples; nothing of a single sample.

    >>> [fold[0].flatten().tolist() for fold in folds_of([torch.arange(6).view(6, 1)])]
    [[0, 4], [1, 5], [2], [3]]
    """
    batches = list(data)
    if len(batches) >= FOLDS:
        yield from (batches[start::FOLDS] for start in range(FOLDS))
        return
    lengths = [
        {len(value) for value in tree_leaves(batch) if isinstance(value, Tensor) and value.ndim} for batch in batches
    ]
    if any(len(found) != 1 for found in lengths):
        return
    fewest = min(min(found) for found in lengths)
    for start in range(min(FOLDS, fewest) if fewest > 1 else 0):
        yield [
            tree_map(
                lambda value, first=start: value[first::FOLDS] if isinstance(value, Tensor) and value.ndim else value,
                batch,
            )
            for batch in batches
        ]


def _errors(model: nn.Module, reader: Reader, others: Tensor, tested: Tensor) -> NDArray[np.float64]:
    """Return the error on samples that were not fitted to, for each of `DAMPINGS`."""
    module = model.get_submodule(reader.path)
    rows = layers.to_rows(module, layers.weight_of(module).detach()).cpu().double()
    units = np.random.default_rng(0).permutation(len(reader.columns))[: len(reader.columns) // 2]
    gone = torch.from_numpy(np.sort(reader.columns[units].ravel()))
    changes = [rows - reconstruct(rows, _more(others, damping), gone) for damping in DAMPINGS]
    return np.array([float(((change @ tested.double()) * change).sum()) for change in changes])


def _positive(moments: Tensor) -> Tensor:
    """Return the nearest positive semidefinite matrix.

    A difference of moments need not be one: inputs may be nothing but rounding, or depend on the batch they are in.
    """
    values, vectors = torch.linalg.eigh(moments.double())
    nearest: Tensor = (vectors * values.clamp(min=0.0)) @ vectors.T
    return nearest


def _more(moments: Tensor, damping: float) -> Tensor:
    """Return moments that `reconstruct` damps by ``damping`` in all."""
    added = (damping - DAMPING) * float(moments.diagonal().mean())
    return moments + torch.eye(len(moments), dtype=moments.dtype) * added
