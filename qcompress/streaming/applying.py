"""`apply`: turns a model in memory into a compressed copy, and an opened model into codes in a folder."""

import hashlib
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from qcompress.compressed import apply as in_memory
from qcompress.compressed.apply import chosen_transforms
from qcompress.compressed.chosen_weights import chosen_model, write_codes
from qcompress.errors import DataError, OptionsError
from qcompress.identity import identify_batches
from qcompress.measurement import Measurement
from qcompress.measuring.candidates import EncodeProgress
from qcompress.measuring.streamed.resume_folder import claim
from qcompress.measuring.streamed.supported import require_supported
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model import forward as forwards
from qcompress.model.chain import without_cache
from qcompress.model.modes import outside_modes
from qcompress.model.opened import Opened, opened_of
from qcompress.model.steady import steady
from qcompress.streaming.encoding import encoded, loaded, need_inputs, reporter, units_of
from qcompress.transforms.base import Transform
from qcompress.transforms.own_code import code_of
from solvers import Solution

KEY_KIND = FileKind("qcompress codes of an opened model", version=1)


@outside_modes
def apply(
    model: in_memory.Model,
    measurement: Measurement,
    solution: Solution,
    *,
    batch_norm_data: Iterable[Any] | None = None,
    forward: forwards.Forward | None = None,
    data: Iterable[Any] | None = None,
    folder: AnyPath | None = None,
    on_encode: Callable[[EncodeProgress], None] | None = None,
) -> in_memory.Model:
    """Return a compressed copy of ``model``, in evaluation mode; the original is not modified.

    Args:
        model: the model that was measured.
        measurement: the result of `measure`.
        solution: a solution of the problem made from ``measurement``; parts that it lists under
            `qcompress.compressed.apply.NEAREST` in its details are rounded to nearest (see `qcompress.guard`).
        batch_norm_data: batches to re-estimate batch-norm statistics on, or None to leave them unchanged.
        forward: ``(model, batch) -> output tensor`` for that, where the default does not fit.
        data: for an opened model, batches that compensated codes are fitted to; its measurement does not contain them.
        folder: for an opened model, the folder to which the codes are written block by block; by default a temporary
            one that is deleted together with the model. Blocks written by an interrupted earlier call are reused.
        on_encode: for an opened model, called after every block has been encoded.

    Raises:
        ModelError: the model is not the measured one, cannot be copied (see
            `qcompress.compressed.copying.own_copy`), or the solution has no choice for it.
        OptionsError, DataError: an opened model does not support an option, or data is missing for it; or the folder
            holds other files, or codes of another choice.

    >>> import torch
    >>> from qcompress import (formulate, measure, prune_quantize, solve)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> measurement = measure(model, [torch.randn(32, 8)], prune_quantize(bits=(4,), sparsity=(0,)))
    >>> solution = solve(formulate(measurement, {"bytes": 0.5}), "brute-force")
    >>> smaller = apply(model, measurement, solution)
    >>> len(smaller[0].weight.unique()) < len(model[0].weight.unique())
    True
    """
    if opened_of(model) is None:
        if data is not None or folder is not None or on_encode is not None:
            given = "data=, folder= and on_encode="
            raise OptionsError(f"{given} are for models that are read block by block, see open_model()")
        return in_memory.apply(model, measurement, solution, batch_norm_data=batch_norm_data, forward=forward)
    if batch_norm_data is not None:
        raise OptionsError("batch-norm statistics cannot be re-estimated in an opened model")
    transforms = chosen_transforms(model, measurement, solution)
    return applied(model, measurement, transforms, forward, data, folder, on_encode)  # type: ignore[return-value]


def applied(
    model: nn.Module,
    measurement: Measurement,
    transforms: Sequence[Transform],
    forward: forwards.Forward | None,
    data: Iterable[Any] | None,
    folder: AnyPath | None,
    on_encode: Callable[[EncodeProgress], None] | None = None,
) -> nn.Module:
    """Return an opened model with the given transform of every part; the other arguments are those of `apply`."""
    opened = opened_of(model)
    assert opened is not None  # noqa: S101
    wanted = {part: (transform,) for part, transform in enumerate(transforms)}
    require_supported(measurement.parts, wanted.values())
    if need_inputs(measurement, wanted) and data is None:
        raise DataError("compensated codes of an opened model are fitted to data: give apply(…, data=batches)")
    path = Path(tempfile.mkdtemp(prefix="qcompress.") if folder is None else folder)
    if folder is not None:
        inputs = forwards.checked_data(data or ()) if need_inputs(measurement, wanted) else None
        names = [part.name for part in measurement.parts]
        claim(path, KEY_KIND, _key(opened, names, transforms, inputs), "the codes of another model, choice or data")
    with (
        tempfile.TemporaryDirectory(prefix="qcompress.") as states,
        forwards.evaluating(model),
        forwards.layer_by_layer(),
        without_cache(model),
    ):
        todo = [unit for unit in units_of(opened, measurement) if not _file(path, unit.name).exists()]
        left = {part: wanted[part] for unit in todo for part in unit.parts}
        sweep = None
        if need_inputs(measurement, left):
            sweep = BlockSweep(model, opened, data or (), steady(forward), Path(states))
            for _ in sweep.forward():
                pass
        report = reporter(measurement, todo, on_encode)
        for unit in todo:
            with loaded(opened, unit):
                codes = encoded(model, measurement, unit, wanted, sweep)
            write_codes(
                _file(path, unit.name), {measurement.parts[part].name: arrays for (part, _), arrays in codes.items()}
            )
            report(unit, codes)
    chosen = chosen_model(model, measurement, transforms, path)
    if folder is None:
        weakref.finalize(chosen, shutil.rmtree, path, ignore_errors=True)
    return chosen


def _key(opened: Opened, names: Sequence[str], transforms: Sequence[Transform], data: Iterable[Any] | None) -> str:
    """Return the digest of everything that the codes of the named parts depend on."""
    digest = None if data is None else identify_batches(data).digest
    settings = [
        opened.identity.digest,
        names,
        [transform.to_json() for transform in transforms],
        code_of(transforms).digest,
        digest,
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _file(folder: Path, unit: str) -> Path:
    return folder / f"{unit}.safetensors"
