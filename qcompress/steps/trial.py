"""Trials before measuring: whether the solver takes such problems, and what the caller's batches and loss do.

Measuring a large model takes hours, so everything that can fail is tried before.
"""

import torch

from qcompress.budgets import LATENCY
from qcompress.compressed.copying import own_copy
from qcompress.formulation import pair_strength
from qcompress.interactions import pair_terms
from qcompress.measuring.channels import offers_channels
from qcompress.measuring.codes_beside import CODES, RANKS
from qcompress.measuring.removals import on_offer
from qcompress.model import forward as forwards
from qcompress.model.batch_norm import reestimate_
from qcompress.model.steady import steady
from qcompress.steps.opened import first_of
from qcompress.steps.preflight import is_surveyed
from qcompress.steps.request import Request
from solvers import Solver, SolverLike, SolverUnavailableError
from solvers.run import as_solver


def resolve_solver(solver: SolverLike) -> Solver:
    """Return the solver that ``solver`` stands for.

    Raises:
        UnknownSolverError, InvalidOptionError: there is no such solver.
        SolverUnavailableError: a package is missing.
    """
    meant = as_solver(solver)
    if why := meant.why_not():
        raise SolverUnavailableError(why)
    return meant


def require_solver(request: Request) -> None:
    """Check that the solver takes the kind of problem that will be formulated, and has its credentials.

    Raises:
        UnsupportedProblemError: it does not take pair terms, in the objective or in a budget.
        SolverError: its credentials are missing.
    """
    solver, given = request.solver, request.measurement
    pairs = pair_strength(request.pairs) > 0 and (given is None or bool(pair_terms(given, given.factor, 1.0)))
    solver.require_kind(pairs=pairs)
    if solver.needs_network or solver.refuse_kind(pairs=True):
        solver.require_kind(pairs=pairs, paired_budgets=_paired_budgets(request))


def _paired_budgets(request: Request) -> list[str]:
    """Return the resources whose budgets will have pair terms: weights that lie along channels of two decisions."""
    if request.measurement is not None:
        return [name for name in request.budget if name in request.measurement.resource_pairs]
    if not offers_channels(request.offered):
        return []
    calibration = request.calibration
    sets, _ = on_offer(request.copied, calibration.data, calibration.forward, request.offered)
    along = [tensor for item in sets for tensor in {axis.tensor for axis in item.axes}]
    offers = [offer for own in request.offered.by_pattern.values() for offer in own.offers]
    coded, ranked = (any(isinstance(offer, kinds) for offer in offers) for kinds in (CODES, RANKS))
    shared = len(set(along)) < len(along)
    paired = {"bytes": shared or coded, "macs": shared or ranked, LATENCY: False}
    return [name for name in request.budget if paired[name]]


def require_loss(request: Request) -> None:
    """Check that the loss can compare outputs for the first batch, if `require_possible` does not do so.

    Raises:
        ModelError: it cannot; or a function of the caller fails, or has no finite value and gradient per sample.
    """
    calibration, model = request.calibration, request.copied
    if is_surveyed(request):
        return
    batch = first_of(model, calibration.first_batch())
    with forwards.evaluating(model), torch.no_grad():
        calibration.loss.require(forwards.run(model, batch, steady(calibration.forward, calibration.seed)), batch)


def require_batch_norm_data(request: Request) -> None:
    """Check that batch-norm statistics can be re-estimated on the given batches, by doing so on a copy of the model.

    Raises:
        DataError: there is no batch, or the model does not accept one.
    """
    if request.batch_norm_data is not None:
        batches = forwards.of_every_shape(request.batch_norm_data, "batch_norm_data")
        reestimate_(own_copy(request.copied), batches, request.calibration.forward)
