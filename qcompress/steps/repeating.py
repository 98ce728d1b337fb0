"""The step after the guard: choose again in the winning way, with the held-out samples added.

As in cross-validation, held-out samples decide how to choose; leaving them out of the choice itself would only make it
worse, most of all with few samples. So the options, encoded as before, are measured on them as well, and the winning
problem is solved again with costs averaged over all samples. The reported held-out loss remains the one of the guard's
choice, which had not seen them.
"""

import math
from dataclasses import replace

from formulations import Problem
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from qcompress.budgets import LATENCY
from qcompress.errors import ResultNotFiniteError
from qcompress.guard import Guarded
from qcompress.measurement import Measurement
from qcompress.measuring.pooled import with_costs_of, with_more_samples, without_moments
from qcompress.model.opened import opened_of
from qcompress.proposals import Proposal, repeatable, repeated
from qcompress.run_folder import Kept, RunFolder
from qcompress.steps.choosing import local_solver
from qcompress.steps.request import Request

FILE_KIND = FileKind("qcompress choice", version=1)


def choose_again(
    request: Request, run: RunFolder, measurement: Measurement, problem: Problem, best: Guarded | None
) -> Proposal | None:
    """Repeat the guard's winning way of choosing with the held-out samples added.

    Returns:
        The choice, or None without a guard. It is the guard's own choice if that does not depend on costs (a uniform
        setting, for example); if held-out samples must stay unseen (``validation``, or before fine-tuning); if a choice
        depends on more than its predicted loss (the smallest use for a loss, times of whole models, removed channels);
        if the model is read block by block; or if an option has outputs on them that are not finite.
    """
    if best is None:
        return None
    won, calibration = best.best, request.calibration
    name = repeatable(won, measurement, request.pairs)
    if name is None or not _may_see_more(request, measurement):
        return won

    try:
        everything = _measured_on_all(request, run, measurement)
    except ResultNotFiniteError:  # an option that was finite on the other samples
        return won
    key = {
        **request.judged_by(),
        "problem": problem.fingerprint(),
        "won": won.to_json(),
        "pairs": request.pairs,
    }
    return run.once(
        "repeat",
        lambda _: repeated(
            won,
            name,
            everything,
            problem,
            pairs=request.pairs,
            solver=local_solver(request, measurement),
            time_limit=request.time_limit,
            seed=calibration.seed,
        ),
        key=key,
        kept=Kept("repeated.json", _save, _load),
    )


def finite_choice(request: Request, best: Guarded | None) -> Proposal | None:
    """Return the guard's choice if its outputs are known to be finite on all data, unlike those of later steps.

    None if there is no such choice, or the model was fine-tuned or is opened (see `choose_again`).
    """
    if best is None or not math.isfinite(best.won.loss_validation):
        return None
    return None if request.finetune_steps or opened_of(request.calibration.model) is not None else best.best


def _measured_on_all(request: Request, run: RunFolder, measurement: Measurement) -> Measurement:
    """Return the measurement averaged over the held-out samples as well."""
    options = [[transform.to_json() for transform in transforms] for transforms in measurement.transforms]
    return run.once(
        "measure_held_out",
        lambda cache: with_more_samples(
            replace(request.calibration, data=request.split.kept),
            measurement,
            jobs=request.jobs,
            cache=cache,
            on_progress=run.watched(request.on_measure),
        ),
        key={**request.measured_from(), **request.identities, "options on offer": options},
        kept=Kept(
            "all_samples.npz",
            lambda everything, path: without_moments(everything).save(path),
            lambda path: with_costs_of(measurement, Measurement.load(path)),
        ),
    )


def _may_see_more(request: Request, measurement: Measurement) -> bool:
    calibration = request.calibration
    unseen = not request.split.kept or request.measurement is not None or request.finetune_steps
    more_than_loss = request.minimize is not None or LATENCY in request.budget or measurement.sets
    return not (unseen or more_than_loss) and opened_of(calibration.model) is None


def _save(proposal: Proposal, path: AnyPath) -> None:
    FILE_KIND.write_json(path, proposal.to_json())


def _load(path: AnyPath) -> Proposal:
    value = FILE_KIND.read_json(path)
    with FILE_KIND.building(path):
        return Proposal.from_json(value)
