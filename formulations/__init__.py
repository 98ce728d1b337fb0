"""From decisions to a `Problem`, and from a Problem to the forms that solvers take.

    tables ──prune_quantize──▶ Problem ──to_bqm / to_cqm / to_integer_program──▶ encoded model + decode

Knows numpy and scipy; dimod and pulp are imported only by the forms that need them; torch is never seen here.
"""

from formulations.errors import (
    EncodingError,
    FileFormatError,
    FormulationError,
    InfeasibleBudgetError,
    InvalidProblemError,
)
from formulations.pairs import PairTerms
from formulations.problem import Evaluation, Problem

__all__ = [
    "EncodingError",
    "Evaluation",
    "FileFormatError",
    "FormulationError",
    "InfeasibleBudgetError",
    "InvalidProblemError",
    "PairTerms",
    "Problem",
]
