"""The steps of `compress`: each computes one value from those of earlier steps.

Every step takes the `Request` and the `RunFolder`. Values that take time to compute are made by `RunFolder.once`, with
a key of only what they depend on: for example, another budget, solver or time limit reuses the measurement.
"""

from qcompress.steps.choosing import (
    formulate_problem,
    guard_choice,
    minimize_use,
    refine_choice,
    solve_problem,
    with_final_choice,
    with_refined_choice,
    with_smallest_use,
)
from qcompress.steps.finishing import apply_choice, finetune_model, fit_in_turn
from qcompress.steps.measuring import copy_model, hold_out_samples, measure_options, refit_moments
from qcompress.steps.metric import with_metric_before
from qcompress.steps.opened import require_supported_steps
from qcompress.steps.preflight import (
    require_fitting,
    require_for_channels,
    require_possible,
    require_storable,
    require_times_that_add_up,
)
from qcompress.steps.repeating import choose_again, finite_choice
from qcompress.steps.reporting import Outcome, loss_of_choice, make_report
from qcompress.steps.request import Arguments, Request
from qcompress.steps.rounds import compress_in_rounds
from qcompress.steps.trial import require_batch_norm_data, require_loss, require_solver, resolve_solver

__all__ = [
    "Arguments", "Outcome", "Request", "apply_choice", "choose_again", "compress_in_rounds", "copy_model",
    "finetune_model", "finite_choice", "fit_in_turn", "formulate_problem", "guard_choice", "hold_out_samples",
    "loss_of_choice", "make_report", "measure_options", "minimize_use", "refine_choice", "refit_moments",
    "require_batch_norm_data", "require_fitting", "require_for_channels", "require_loss", "require_possible",
    "require_solver", "require_storable", "require_supported_steps", "require_times_that_add_up", "resolve_solver",
    "solve_problem", "with_final_choice", "with_metric_before", "with_refined_choice", "with_smallest_use",
]  # fmt: skip
