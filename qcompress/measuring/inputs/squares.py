"""Mean square of every input column of a layer, by which ggml's encoders weight columns.

One pass over the data sums ``x²`` over every input row of the dense layers that have the weight; a vocabulary that is
also the output layer (tied weights) gets the squares of that layer's inputs. No activations are kept, only one number
per column.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.errors import DataError
from qcompress.measuring.inputs.moments import input_rows, listen
from qcompress.model import forward as forwards
from qcompress.model.parts import Part


def input_squares(
    model: nn.Module,
    parts: Iterable[Part],
    data: Iterable[Any],
    forward: forwards.Forward | None,
    moments: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Return ``(per_channel,)`` float32 ``E[x²]`` by the path of a part's first module, for weights of dense layers.

    Args:
        model: same as in `measure`.
        parts: parts of the model.
        data: batches.
        forward: how to run a batch.
        moments: second moments of the same inputs by the same path; where present, their diagonals are used.

    Raises:
        DataError: the inputs of a layer are not finite.

    >>> from qcompress.model.parts import survey
    >>> model, data = nn.Sequential(nn.Linear(2, 1)), [torch.tensor([[1.0, 2.0], [3.0, 0.0]])]
    >>> input_squares(model, survey(model, data).parts, data, None)
    {'0': tensor([5., 2.])}
    """
    known = {
        path: moments[path].diagonal().clone()
        for path in dict.fromkeys(part.modules[0] for part in parts)
        if path in moments and moments[path].ndim == 2
    }
    parts = [part for part in parts if part.modules[0] not in known]
    if not parts:
        return known
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, module: nn.Module, given: Tensor, real: Tensor | None) -> None:
        for rows in input_rows(module, given.detach() if real is None else given.detach()[real]):
            squares = rows.square().sum(0, dtype=torch.float64)
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] = counts.get(name, 0) + len(rows)

    dense = {
        part.modules[0]: [path for path in part.modules if isinstance(model.get_submodule(path), nn.Linear)]
        for part in parts
    }
    listen(model, dense, data, forward, add)
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise DataError(f"the inputs of {name!r} are not finite on the calibration data")
    return known | {name: (total / counts[name]).float().cpu() for name, total in sums.items()}
