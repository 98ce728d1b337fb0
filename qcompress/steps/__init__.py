"""The steps of `compress`, each from the values before it to one more: a step does only what its name says.

Every step takes the `Request` and the `RunFolder`, and gives its value by `RunFolder.once` where making it takes
time, keyed by what matters to it alone: another budget, solver or time limit leaves the measurement standing.
"""

from qcompress.steps.choosing import formulated, guarded, limited, minimized, moved, refined, solved, taken
from qcompress.steps.early import require_fitting, require_for_channels, require_possible
from qcompress.steps.finishing import applied, finetuned, made_up
from qcompress.steps.measuring import copied, kept_aside, measured, refitted
from qcompress.steps.opened import require_taken
from qcompress.steps.reporting import Outcome, reported
from qcompress.steps.request import Arguments, NoChoiceError, Request

__all__ = [
    "Arguments", "NoChoiceError", "Outcome", "Request", "copied", "require_fitting", "require_taken",
    "require_for_channels", "require_possible", "kept_aside", "measured", "formulated", "minimized", "limited",
    "solved", "refined", "guarded", "moved", "taken", "refitted", "applied", "made_up", "finetuned", "reported",
]  # fmt: skip
