"""The steps of `compress`: each computes one value from those of earlier steps.

Every step takes the `Request` and the `RunFolder`. Values that take time to compute are made by `RunFolder.once`, with
a key of only what they depend on: for example, another budget, solver or time limit reuses the measurement.
"""

from qcompress.steps.choosing import formulated, guarded, limited, minimized, moved, refined, solved, taken
from qcompress.steps.finishing import applied, finetuned, made_up
from qcompress.steps.measuring import copied, kept_aside, measured, refitted
from qcompress.steps.metric import with_metric_before
from qcompress.steps.opened import require_taken
from qcompress.steps.preflight import (
    require_fitting,
    require_for_channels,
    require_possible,
    require_storable,
    require_times_that_add_up,
)
from qcompress.steps.repeating import chosen_again, known_finite
from qcompress.steps.reporting import Outcome, loss_of_choice, reported
from qcompress.steps.request import Arguments, Request
from qcompress.steps.rounds import in_rounds
from qcompress.steps.trial import ready, require_batch_norm_data, require_loss, require_solver

__all__ = [
    "Arguments", "Outcome", "Request", "copied", "require_fitting", "require_taken",
    "require_for_channels", "require_times_that_add_up", "require_possible", "kept_aside", "measured", "formulated",
    "minimized", "limited", "solved", "refined", "guarded", "chosen_again", "moved", "taken", "refitted", "applied",
    "made_up", "finetuned", "reported", "known_finite", "loss_of_choice", "in_rounds", "require_batch_norm_data",
    "require_loss", "require_storable", "require_solver", "with_metric_before", "ready",
]  # fmt: skip
