"""The step after the guard: choose once more in the way that won, with the held-out samples added.

Held-out samples decide how to choose, as in cross-validation; kept out of the choice itself they would only make it
worse, most of all where samples are few. So the options are measured on them as well, encoded as they were, and the
winning problem is solved again with costs averaged over all samples. The reported held-out loss stays that of the
guard's choice, which had not seen them.
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
        The choice; the guard's, if it follows from no costs (a uniform setting, for example), or where held-out samples
        must stay unseen (those of ``validation``, or before fine-tuning), and where a choice is more than its predicted
        loss (the smallest use for a loss, times of whole models, removed channels), or the model is read block by
        block; or where an option makes outputs for them that are not finite. None without a guard.
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
    """Return the guard's choice if its outputs are known to be finite on all data, unlike those of what came after it.

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
