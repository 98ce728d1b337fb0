"""Apply the chosen options to a model.

Every part is encoded and decoded again, so the model holds exactly the weights that its file will hold. A record of
the stored arrays is attached to the model (`qcompress.compressed.record`) for `save_compressed`.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from qcompress.compressed.channels import remove_chosen_
from qcompress.compressed.copying import own_copy
from qcompress.compressed.record import CompressedPart, Compression, attach, install_
from qcompress.errors import ModelError, NotFiniteError, OptionsError, ResultNotFiniteError
from qcompress.measurement import Measurement, require_measurement
from qcompress.model.batch_norm import reestimate_
from qcompress.model.calibration import require_changeable
from qcompress.model.composed import compose_
from qcompress.model.forward import Forward, first_batch, read_data
from qcompress.model.modes import outside_modes
from qcompress.model.opened import require_in_memory
from qcompress.model.tensors import left_out_bytes, total_bytes
from qcompress.transforms.base import Transform
from solvers import Solution

Model = TypeVar("Model", bound=nn.Module)

NEAREST = "nearest"
"""Key in a solution's ``details``: indices of parts to round to nearest, despite their compensated option."""


@outside_modes
def apply(
    model: Model,
    measurement: Measurement,
    solution: Solution,
    *,
    batch_norm_data: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> Model:
    """Return a compressed copy of ``model``, in evaluation mode.

    Args:
        model: the model that was measured; it is not modified.
        measurement: result of `measure`.
        solution: a solution of the problem made from ``measurement``. Parts listed under `NEAREST` in its details are
            rounded to nearest (see `qcompress.guard`).
        batch_norm_data: batches on which to re-estimate batch-norm statistics, or None to leave them unchanged.
        forward: ``(model, batch) -> output tensor`` for re-estimation, if the default does not fit.

    Raises:
        ModelError: the model is not the one that was measured, it cannot be copied (see
            `qcompress.compressed.copying.own_copy`), or the solution holds no choice for it.

    >>> import torch
    >>> from qcompress import (formulate, measure, prune_quantize, solve)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> measurement = measure(model, [torch.randn(32, 8)], prune_quantize(bits=(4,), sparsity=(0,)))
    >>> solution = solve(formulate(measurement, {"bytes": 0.5}), "brute-force")
    >>> smaller = apply(model, measurement, solution)
    >>> len(smaller[0].weight.unique()) < len(model[0].weight.unique())
    True
    """
    transforms = chosen_transforms(model, measurement, solution)
    batch = None
    if batch_norm_data is not None:
        batch_norm_data = read_data(batch_norm_data, "batch_norm_data")
        batch = first_batch(batch_norm_data)
    return put_(own_copy(model, batch, forward).eval(), measurement, transforms, batch_norm_data, forward)


@outside_modes
def apply_(
    model: Model,
    measurement: Measurement,
    solution: Solution,
    *,
    batch_norm_data: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> Model:
    """Compress ``model`` in place and return it, in the mode it is in; the arguments are those of `apply`.

    Loading the original state dict undoes it; after low-rank options, call `qcompress.compressed.factored.fold_` first.
    Weights that are computed from others (parametrizations) become plain parameters permanently.
    """
    require_changeable(model)
    require_in_memory(model, "apply_", "apply() returns a smaller model and leaves this one unchanged")
    if batch_norm_data is not None:
        batch_norm_data = read_data(batch_norm_data, "batch_norm_data")
    return put_(model, measurement, chosen_transforms(model, measurement, solution), batch_norm_data, forward)


def chosen_transforms(model: nn.Module, measurement: Measurement, solution: Solution) -> list[Transform]:
    """Return the transform that a solution chooses for every part.

    Raises:
        ModelError: the model, the measurement and the solution do not belong together.
    """
    require_measurement(measurement)
    if not isinstance(solution, Solution):
        raise OptionsError(
            f"solution must be a qcompress.Solution, found {type(solution).__name__}: Solution.load(path) reads one "
            "from its file"
        )
    if solution.choice is None:
        raise ModelError(
            f"the solution of solver {solution.solver!r} holds no choice (status {solution.status}), so there is "
            "nothing to apply; allow the solver more time or raise a budget"
        )
    choice = choice_of(measurement, solution.choice)
    require_same_bytes(measurement, choice, solution.usage, "the solution")
    require_measured(model, measurement.model_fingerprint)
    chosen = [options[option] for options, option in zip(measurement.transforms, choice, strict=True)]
    for part in solution.details.get(NEAREST, ()):
        chosen[part] = chosen[part].nearest
    return chosen


def require_same_bytes(measurement: Measurement, choice: list[int], usage: Mapping[str, float], whose: str) -> None:
    """Check that a choice takes the bytes that its solution or problem says.

    Raises:
        ModelError: it does not, so that ``whose`` usage it is was made from another measurement.
    """
    stated = usage.get("bytes")
    if stated is None or measurement.sets:  # uses of channels are not sums
        return
    firsts = np.cumsum([0, *map(len, measurement.transforms)])[:-1]
    parts = float(measurement.resources["bytes"][firsts + choice].sum())
    whole = parts + measurement.fixed["bytes"]
    if not any(math.isclose(stated, expected, rel_tol=1e-9, abs_tol=0.5) for expected in (whole, parts)):
        raise ModelError(
            f"{whose} was made from another measurement: it takes {stated:,.0f} bytes, and its choice from this "
            f"measurement would take {whole:,.0f}"
        )


def as_choice(choice: ArrayLike) -> NDArray[np.int64]:
    """Return ``(G,)`` option numbers.

    Raises:
        ModelError: these are none.
    """
    with contextlib.suppress(TypeError, ValueError):
        array = np.asarray(choice)
        if array.ndim == 1 and array.dtype.kind in "iuf" and (array == (whole := array.astype(np.int64))).all():
            return whole
    raise ModelError(
        f"a choice is a list with the number of an option for every part, such as solution.choice; found {choice!r}"
    )


def choice_of(measurement: Measurement, choice: ArrayLike) -> list[int]:
    """Return the option of every part from a choice ``(G,)`` for the problem made from ``measurement``.

    Raises:
        ModelError: the choice belongs to another problem.
    """
    chosen: list[int] = as_choice(choice).tolist()
    num_parts = len(measurement.parts)
    if len(chosen) != num_parts:
        raise ModelError(
            f"the solution chooses for {len(chosen)} groups, the measurement has {num_parts} parts: "
            "it belongs to another problem"
        )
    for part, options, option in zip(measurement.parts, measurement.transforms, chosen, strict=True):
        if not 0 <= option < len(options):
            raise ModelError(f"the solution chooses option {option} for {part.name!r}, which has {len(options)}")
    return chosen


def require_measured(model: nn.Module, fingerprint: str) -> None:
    """Check that the fingerprint of a model's state dict is that of the measured model.

    Raises:
        ModelError: it is not.
    """
    actual = Measurement.fingerprint_of(model)
    if actual != fingerprint:
        raise ModelError(
            f"this is not the model that was measured: its state dict has the fingerprint {actual[:12]}…, not "
            f"{fingerprint[:12]}…; use the original weights (undo an earlier apply), or measure this model"
        )


def put_(
    model: Model,
    measurement: Measurement,
    transforms: list[Transform],
    batch_norm_data: Iterable[Any] | None = None,
    forward: Forward | None = None,
) -> Model:
    """Apply the transform chosen for every part to ``model``, the measured one, in place."""
    compose_(model)
    if measurement.sets:
        remove_chosen_(model, measurement, transforms)
        if batch_norm_data is not None:
            _reestimate_(model, batch_norm_data, forward)
        return model
    fixed_bytes = _fixed_bytes(model, measurement)
    parts = []
    for index, (part, weight) in enumerate(zip(measurement.parts, measurement.weights(model), strict=True)):
        try:
            stored = measurement.encoded(index, transforms[index], weight)
        except ModelError as error:
            raise ModelError(f"cannot compress {part.name!r}: {error}") from error
        parts.append(CompressedPart(part=part, transform=transforms[index], stored=stored))
    install_(model, parts)
    chosen_bytes = sum(item.transform.size_bytes(item.part.target) for item in parts)
    attach(model, Compression(parts=tuple(parts), payload_bytes=fixed_bytes + chosen_bytes))
    if batch_norm_data is not None:
        _reestimate_(model, batch_norm_data, forward)
    return model


def _reestimate_(model: nn.Module, data: Iterable[Any], forward: Forward | None) -> None:
    """Re-estimate batch-norm statistics of a compressed model, whose outputs may not be finite."""
    try:
        reestimate_(model, data, forward)
    except NotFiniteError as error:
        raise ResultNotFiniteError(f"while batch norms of the compressed model were re-estimated: {error}") from error


def _fixed_bytes(model: nn.Module, measurement: Measurement) -> int:
    """Return the bytes of everything that is not a part, without non-persistent buffers.

    Raises:
        ModelError: they differ from the measured ones.
    """
    dense = sum(part.target.dense_bytes for part in measurement.parts)
    actual, expected = total_bytes(model) - dense, int(measurement.fixed["bytes"])
    left_out = left_out_bytes(model)
    if actual != expected and not left_out:  # their size may depend on the last batch
        raise ModelError(
            f"this is not the model that was measured: what is left unchanged takes {actual:,} bytes, but "
            f"{expected:,} were measured; tensors were added or removed, or no longer share memory"
        )
    return actual - left_out
