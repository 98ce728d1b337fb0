"""Reconstruction: refit a layer's remaining weights by least squares when some of its inputs are removed.

A layer computes ``W·x``. If the inputs R are removed and the remaining inputs K get the weights ``W'``, the error
``E‖W·x - W'·x_K‖²`` is least for ``W' = W_K + W_R·H_RK·H_KK⁻¹`` with the second moments ``H = E[x·xᵀ]``. This is the
optimal brain surgeon for groups (Hassibi & Stork, NIPS 1992; layer by layer as in arXiv 2208.11580).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qcompress.model import layers
from qcompress.model.coupled import Axis, CoupledSet

DAMPING = 0.01
"""Multiple of the moments' mean diagonal added to the diagonal, because some inputs have almost no variance."""

DAMPINGS = (DAMPING, 0.1, 1.0, 10.0)
"""Such multiples to choose from where samples are few, by what holds for samples that were not fitted to."""

KINDS = (nn.Linear, *layers.CONVOLUTIONS)

FOLDS = 4
"""Parts of the samples: what is fitted to all others is tested on each of them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reader:
    """A layer that reads a set and whose inputs are known.

    Attributes:
        path: path of the layer.
        columns: ``(units, columns per unit)`` columns of its weight as rows.
    """

    path: str
    columns: NDArray[np.int64]


def readers(model: nn.Module, item: CoupledSet) -> list[Reader]:
    """Return the linear layers and ungrouped convolutions that read a set."""
    reading = []
    for axis in item.axes:
        path = axis.tensor.rpartition(".")[0]
        module = model.get_submodule(path) if axis.reads and axis.tensor.endswith(".weight") else None
        if module is None or not layers.is_plain(module) or getattr(module, "groups", 1) != 1:
            continue
        inputs_first = layers.has_inputs_first(module)
        if (inputs_first or isinstance(module, KINDS)) and axis.dim == (0 if inputs_first else 1):
            reading.append(Reader(path=path, columns=_columns(axis, layers.weight_of(module))))
    return reading


def _columns(axis: Axis, weight: Tensor) -> NDArray[np.int64]:
    each = weight[0, 0].numel()
    return np.asarray((axis.indices[:, :, None] * each + np.arange(each)).reshape(len(axis.indices), -1))


def damped(moments: Tensor) -> Tensor:
    """Return second moments in float64 with `DAMPING` on the diagonal."""
    wide = moments.double()
    diagonal = wide.diagonal()
    return wide + torch.eye(len(wide), dtype=torch.float64) * max(DAMPING * float(diagonal.mean()), 1e-30)


def reconstruct(rows: Tensor, moments: Tensor, gone: Tensor) -> Tensor:
    """Return rows ``(channels, n)`` with the columns ``gone`` zero and the others refitted for the least output error.

    >>> rows, moments = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # two inputs that are one
    >>> reconstruct(rows, moments, torch.tensor([1])).round(decimals=1)
    tensor([[2., 0.]])
    """
    whole = damped(moments)
    mask = torch.ones(len(whole), dtype=torch.bool)
    mask[gone] = False
    stay = mask.nonzero()[:, 0]
    wide = rows.detach().cpu().double()
    if not len(stay):
        return torch.zeros_like(rows)
    factor = torch.linalg.cholesky(whole[stay][:, stay])
    shared, lost = whole[stay][:, gone], wide[:, gone]
    result = torch.zeros_like(wide)
    if len(lost) < len(gone):  # the shorter of two ways to the same numbers
        result[:, stay] = wide[:, stay] + torch.cholesky_solve(shared @ lost.T, factor).T
    else:
        result[:, stay] = wide[:, stay] + lost @ torch.cholesky_solve(shared, factor).T
    return result.to(rows)


def reconstruct_(
    model: nn.Module,
    sets: Sequence[CoupledSet],
    removed: Mapping[str, NDArray[np.int64]],
    moments: Mapping[str, NDArray[np.float32]],
) -> None:
    """Refit every layer that reads removed units and whose moments are known, in place."""
    gone: dict[str, list[NDArray[np.int64]]] = {}
    for item in sets:
        if len(units := removed.get(item.name, ())):
            for reader in readers(model, item):
                if reader.path in moments:
                    gone.setdefault(reader.path, []).append(reader.columns[units].ravel())
    with torch.no_grad():
        for path, columns in gone.items():
            module = model.get_submodule(path)
            weight = layers.weight_of(module)
            rows = layers.to_rows(module, weight.detach())
            places = torch.from_numpy(np.unique(np.concatenate(columns)))
            weight.copy_(layers.from_rows(module, reconstruct(rows, torch.tensor(moments[path]), places), weight.shape))
