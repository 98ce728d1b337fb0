"""Build a `Problem` from tables of options, and convert it to the forms that solvers take.

    tables ──prune_quantize──▶ Problem ──to_bqm / to_cqm / to_nonlinear / …──▶ encoded model + decode

This package depends on numpy and scipy. The forms that need dimod, pulp or dwave-optimization import them on first
use; torch is never imported here.
"""

import importlib
from typing import Any

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
    "explain_infeasibility",
    "to_bqm",
    "to_cqm",
    "to_integer_program",
    "to_nonlinear",
    "read_problem",
    "write_bqm",
    "write_cqm",
    "write_lp",
    "write_mps",
    "write_problem",
    "write_qubo",
    "decode_bits",
]

_FORMS = {
    "explain_infeasibility": "formulations.feasibility.explain",
    "to_bqm": "formulations.forms.bqm",
    "to_cqm": "formulations.forms.cqm",
    "to_integer_program": "formulations.forms.integer_program",
    "to_nonlinear": "formulations.forms.nonlinear",
    "read_problem": "formulations.exchange.suffixes",
    "write_bqm": "formulations.exchange.suffixes",
    "write_cqm": "formulations.exchange.suffixes",
    "write_lp": "formulations.exchange.suffixes",
    "write_mps": "formulations.exchange.suffixes",
    "write_problem": "formulations.exchange.suffixes",
    "write_qubo": "formulations.exchange.suffixes",
    "decode_bits": "formulations.exchange.bits",
}


def __getattr__(name: str) -> Any:
    """Import a form, and the library it needs, on first use."""
    if name not in _FORMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FORMS[name]), name)
