"""`measure`: iterate over the batches, report progress, and save the state so that an interrupted run can resume."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from formulations.files import AnyPath
from qcompress.errors import OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring.accumulation import accumulate
from qcompress.measuring.candidates import Candidates, EncodeProgress, fitted
from qcompress.measuring.channels import measure_channels, offers_channels
from qcompress.measuring.inputs.moments import forecast_bytes, second_moments
from qcompress.measuring.inputs.ranges import activation_ranges
from qcompress.measuring.inputs.squares import input_squares
from qcompress.measuring.kept_codes import KeptCodes
from qcompress.measuring.memory import require_memory, return_free_memory
from qcompress.measuring.methods.alone import rises_alone, samples_to_run
from qcompress.measuring.methods.reruns import NOT_IN_FLOAT32, options_to_run, sample_places, with_runs
from qcompress.measuring.options_by_layer import Offered, calibrated_options
from qcompress.measuring.progress import MeasureProgress
from qcompress.measuring.replacing import reasons_and_notes, tried_out
from qcompress.measuring.stopping import Stop
from qcompress.measuring.streamed.measure import measure_streamed
from qcompress.measuring.sums import Sums
from qcompress.measuring.workers import checked_jobs
from qcompress.model import forward as forwards
from qcompress.model.calibration import Calibration
from qcompress.model.composed import composed
from qcompress.model.losses import Loss, LossFunction, as_loss
from qcompress.model.modes import outside_modes, seeded
from qcompress.model.opened import opened_of
from qcompress.model.padding import padding_named
from qcompress.model.parts import Part, Survey, survey
from qcompress.model.steady import steady
from qcompress.model.tensors import total_bytes
from qcompress.model.weights import layer_names
from qcompress.options import Options
from qcompress.scalars import as_cache_file
from qcompress.transforms.base import Ranges

METHODS = ("fisher", "direct", "sampled")


@outside_modes
@seeded
def measure(
    model: nn.Module,
    data: Iterable[Any],
    options: Options | Mapping[str, Options] | Offered,
    *,
    skip: str | Iterable[str] = (),
    only: str | Iterable[str] | None = None,
    method: str = "fisher",
    loss: str | LossFunction | Loss = "kl",
    forward: forwards.Forward | None = None,
    granularity: str | int = "layer",
    seed: int = 0,
    jobs: int = 1,
    original: nn.Module | None = None,
    cache: AnyPath | None = None,
    memory: int | str | None = None,
    precision: float | None = None,
    time_limit: float | None = None,
    on_progress: Callable[[MeasureProgress], None] | None = None,
    on_encode: Callable[[EncodeProgress], None] | None = None,
) -> Measurement:
    """Measure the effect of every option of every part on the loss, alone and together with the others.

    Args:
        model: the original model; it is not modified. A model from `qcompress.open_model` is measured block by block,
            with ``method="sampled"``; its samples are the rows of a batch's tensors, and its macs those of the first.
        data: re-iterable batches: tensors, (inputs, targets) or dicts.
        options: options on offer, such as ``prune_quantize() + low_rank()``, for all layers or by patterns of layer
            names, of which the first match counts: ``{"head": prune_quantize(bits=(8,)), "*": prune_quantize()}``.
            Whitened low-rank options and compensated codes need an additional pass over the data, and for each distinct
            input a square matrix of the size of a layer's weights per channel (layers of more than `MAX_INPUTS` go
            without). They are fitted to this data: give more inputs (tokens, positions) than a layer has weights per
            channel.
        skip: patterns of names of layers that are not compressed, such as ``("lm_head", "*.norm*")``. Channels that
            such a layer makes or reads stay, because it would change with them.
        only: patterns of names of the only layers to compress; None for all. Channels may be removed if only such
            layers make them; the layers that read them lose these inputs.
        method: ``"fisher"``: linearised, a few backward passes for all options. ``"direct"``: the true loss increase of
            every option, one partial forward pass per option and batch; in half precision a small increase is lost in
            the rounding of the outputs. ``"sampled"``: one backward pass per sample for all options, from weight
            gradients; for language models and other outputs of many numbers. Its costs are estimates, with a
            standard error; the options whose errors matter most are also run alone on some of the samples, for at
            most the work of two forward passes over all (`Measurement.ran`).
        loss: ``"kl"`` to the original's softmax (nats per sample; ``"kl:1"`` with the classes in dimension 1),
            ``"mse"`` of outputs, or a callable ``(output, batch) -> (samples,)``.
        forward: ``(model, batch) -> output tensor`` where the default does not fit.
        granularity: ``"layer"``, or the number of output channels per block.
        seed: seed for the random mixtures that represent large outputs.
        jobs: number of processes, which measure one batch at a time (-1: one per core); with ``joblib.parallel_config``
            those of a cluster. Any number from 2 gives exactly the same measurement; 1 may differ in rounding, because
            worker processes use one thread each and sums over several threads may round differently.
        original: the network whose outputs losses are relative to, if ``model`` is a smaller network made from it; for
            channels.
        cache: file for the sums so far, next to a folder ``….codes`` with the encoded options; an interrupted
            measurement resumes from both, and they are deleted at the end. For an opened model a folder.
        memory: memory limit of the process while an opened model is measured, such as ``"4 GB"``; if the largest block
            does not fit, an error is raised before any long computation.
        precision: relative standard error of the predicted loss at which measuring stops before all batches are done
            (of choices from mild to harsh, the largest); for ``"sampled"`` in memory.
        time_limit: seconds of passes after which measuring stops before all batches are done, without running options
            alone; for models in memory.
        on_progress: called after every batch, and every sample that options are run on; for an opened model after every
            block.
        on_encode: called with a forecast after the options of each part have been encoded.

    Random numbers drawn in a pass are the same in every pass, and buffers that a pass changes are restored. Where the
    gradient does not capture everything that a weight does, ``"fisher"`` evaluates the options of that part one by one
    (`Measurement.tried` says why).

    Raises:
        ModelError, DataError, OptionsError: see `qcompress.errors`. Where an option makes the loss NaN or infinite, the
            message names it; one that ``"sampled"`` runs alone is left out instead, and named in `Measurement.notes`.

    >>> import torch
    >>> from qcompress.options import prune_quantize
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    >>> measurement = measure(model, [torch.randn(32, 8)], prune_quantize(bits=(4, 8), sparsity=(0,)))
    >>> measurement.labels[0]
    ('keep', '4 bits', '8 bits')
    """
    require_method(method, granularity)
    jobs = checked_jobs(jobs)
    stop = Stop.of(precision, time_limit, method, by_block=opened_of(model) is not None)
    offered = Offered.of(options, skip=skip, only=only)
    calibration = Calibration(model=model, data=data, forward=forward, loss=as_loss(loss), seed=seed, original=original)
    if opened_of(model) is None:
        as_cache_file(cache)
    with padding_named(data):
        if offers_channels(offered):
            if opened_of(model) is not None or memory is not None or granularity != "layer":
                raise OptionsError(
                    "channels are measured on a model in memory, and in blocks by prune_channels(granularity=...)"
                )
            together = partial(accumulate, jobs=jobs)
            with composed(model), forwards.evaluating(model), forwards.evaluating(calibration.goal):
                return measure_channels(
                    calibration, offered, together, method, cache, on_progress, on_encode, stop=stop
                )
        if original is not None:
            raise OptionsError("original= is for channels; remeasure() measures other options around a choice")
        if opened_of(model) is not None:
            _require_streamable(method, granularity, jobs)
            return measure_streamed(
                calibration, offered, cache=cache, memory=memory, on_progress=on_progress, on_encode=on_encode
            )
        if memory is not None:
            raise OptionsError("memory= is for models that are read block by block: give qcompress.open_model(folder)")
        return _measured_in_memory(
            calibration,
            offered,
            method=method,
            granularity=granularity,
            jobs=jobs,
            cache=cache,
            stop=stop,
            on_progress=on_progress,
            on_encode=on_encode,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Statistics:
    """Statistics of the layers' inputs that options are fitted to, by `Part.path`; see `fitted`."""

    moments: Mapping[str, Tensor]
    num_inputs: Mapping[str, int]
    squares: Mapping[str, Tensor]
    ranges: Mapping[str, Ranges]

    def arguments(self) -> dict[str, Any]:
        """Return them as keyword arguments of `fitted`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _statistics(
    model: nn.Module, batches: Iterable[Any], run: forwards.Forward, parts: Sequence[Part], per_part: dict[str, Options]
) -> _Statistics:
    """Collect, in passes over the data, the statistics that some option of a layer needs.

    Raises:
        OptionsError: the second moments do not fit into the available memory.
    """
    return_free_memory()  # of the survey's backward pass, before options are encoded
    calibrated = [part for part in parts if per_part[part.name].need_moments(part.target)]
    require_memory(forecast_bytes(calibrated))
    moments, num_inputs = second_moments(model, calibrated, batches, run) if calibrated else ({}, {})
    weighed = [part for part in parts if per_part[part.name].need_squares(part.target)]
    squares = input_squares(model, weighed, batches, run, moments) if weighed else {}
    ranged = [part for part in parts if per_part[part.name].need_ranges(part.target)]
    ranges = activation_ranges(model, ranged, batches, run) if ranged else {}
    return _Statistics(moments=moments, num_inputs=num_inputs, squares=squares, ranges=ranges)


def _measured_in_memory(
    calibration: Calibration,
    offered: Offered,
    *,
    method: str,
    granularity: str | int,
    jobs: int,
    cache: AnyPath | None,
    stop: Stop,
    on_progress: Callable[[MeasureProgress], None] | None,
    on_encode: Callable[[EncodeProgress], None] | None,
) -> Measurement:
    """`measure` for a model whose weights are all in memory."""
    model, batches, measured = calibration.model, calibration.data, calibration.loss
    seed, run = calibration.seed, steady(calibration.forward, calibration.seed)
    with composed(model), forwards.evaluating(model):
        total_bytes(model)  # raises for models whose size cannot be counted
        offered.require_known(layer_names(model))
        fingerprint, code = Measurement.fingerprint_of(model), offered.code().digest
        run.require_same(model, forwards.first_batch(batches))
        inventory = survey(model, batches, run, granularity, loss=measured, left_out=offered.left_out)
        per_part, notes = calibrated_options(inventory.parts, offered)
        inventory = tried_out(model, inventory, per_part, forwards.first_batch(batches), run)
        seen = _statistics(model, batches, run, inventory.parts, per_part)
        kept = KeptCodes(None if cache is None else Path(f"{cache}.codes"), code)
        candidates, errors = fitted(
            model, inventory.parts, per_part, on_encode=on_encode, kept=kept, **seen.arguments()
        )
        sums = accumulate(
            model, batches, candidates, measured, method, seed, run,
            [fingerprint, method, granularity, code, None if cache is None else calibration.digests()],
            tried=inventory.tried, jobs=jobs, cache=cache, stop=stop, on_progress=on_progress,
        )  # fmt: skip
        notes += stop.notes(sums, candidates, inventory.num_batches)
        stated = _stated(
            inventory,
            candidates,
            sums,
            seen,
            method=method,
            calibration=calibration,
            fingerprint=fingerprint,
            errors=errors,
            notes=tuple(notes),
        )
        measurement = _with_runs(stated, calibration, candidates, sums, run, stop, on_progress)
        Measurement.require_as_before(model, fingerprint)
    moved = [f"{name} changes while the model runs; it was restored after every pass" for name in sorted(run.moved)]
    measurement = replace(measurement, notes=(*measurement.notes, *moved))
    if cache is not None:
        Path(cache).unlink(missing_ok=True)
        kept.done()
    return measurement


def _with_runs(
    measurement: Measurement,
    calibration: Calibration,
    candidates: Candidates,
    sums: Sums,
    run: forwards.Forward,
    stop: Stop,
    on_progress: Callable[[MeasureProgress], None] | None,
) -> Measurement:
    """Return a measurement by ``"sampled"`` with the costs of the options that are worth running, see `reruns`."""
    count, start = sums.num_columns, time.perf_counter()
    runs = options_to_run(measurement, count) if sums.by_sample and not stop.ended_by_time(sums) else []
    if not runs:
        return measurement

    def chosen() -> Iterator[Any]:
        for done, sample in enumerate(samples_to_run(calibration.data, sums.num_batches, count), start=1):
            yield sample
            if on_progress is not None:
                on_progress(
                    MeasureProgress(
                        batches=done, total_batches=len(sample_places(count)), num_samples=sums.num_samples,
                        elapsed_s=time.perf_counter() - start, unit=f"samples with {len(runs)} options alone",
                    )
                )  # fmt: skip

    found = rises_alone(calibration.model, candidates, calibration.loss, run, chosen(), runs)
    if found is None:
        return replace(measurement, notes=(*measurement.notes, NOT_IN_FLOAT32))
    return with_runs(measurement, count, runs, *found)


def _stated(
    inventory: Survey,
    candidates: Candidates,
    sums: Sums,
    seen: _Statistics,
    *,
    method: str,
    calibration: Calibration,
    fingerprint: str,
    errors: NDArray[np.float64],
    notes: tuple[str, ...],
) -> Measurement:
    """Assemble the measurement from the results of the passes over the data."""
    shared = {id(table): table.numpy() for table in seen.moments.values()}
    no_choice, more = reasons_and_notes(inventory, candidates.transforms)
    return Measurement(
        parts=inventory.parts,
        transforms=candidates.transforms,
        cost=sums.mean_cost(),
        softened=sums.mean_softened(),
        factor=sums.factor(),
        standard_error=sums.standard_error(),
        error=errors,
        resources=_resources(candidates),
        fixed=MappingProxyType(inventory.fixed),
        original=MappingProxyType(inventory.original),
        skipped=inventory.skipped,
        selecting=inventory.selecting,
        num_samples=sums.num_samples,
        method=method,
        loss=calibration.loss.name,
        seed=calibration.seed,
        model_fingerprint=fingerprint,
        standing=candidates.standing,
        moments=MappingProxyType({name: shared[id(table)] for name, table in seen.moments.items()}),
        num_inputs=MappingProxyType(seen.num_inputs),
        tried=MappingProxyType(sums.tried),
        notes=(*more, *notes),
        no_choice=MappingProxyType(no_choice),
        codes=candidates.codes,
        squares=MappingProxyType({name: values.numpy() for name, values in seen.squares.items()}),
    )


def require_method(method: str, granularity: str | int) -> None:
    """Check the method and the granularity.

    Raises:
        OptionsError: the method or the granularity is unknown.
    """
    if method not in METHODS:
        raise OptionsError(f"method must be one of {', '.join(METHODS)}, found {method!r}")
    if granularity != "layer" and (type(granularity) is not int or granularity < 1):
        raise OptionsError(f"granularity must be 'layer' or a number of channels per block, found {granularity!r}")


def _require_streamable(method: str, granularity: str | int, jobs: int) -> None:
    """Raise `OptionsError` unless an opened model can be measured in this way."""
    if method != "sampled" or granularity != "layer" or jobs != 1:
        raise OptionsError(
            f"an opened model is measured with method='sampled', layer by layer, in one process; found "
            f"method={method!r}, granularity={granularity!r}, jobs={jobs}"
        )


def _resources(candidates: Candidates) -> MappingProxyType[str, Any]:
    """``bytes`` and ``macs`` of every option."""
    pairs = [
        (part.target, transform)
        for part, options in zip(candidates.parts, candidates.transforms, strict=True)
        for transform in options
    ]
    macs = np.array([transform.macs(target) for target, transform in pairs], dtype=np.float64)
    return MappingProxyType({"bytes": candidates.size_bytes, "macs": macs})
