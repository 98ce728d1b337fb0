"""Compare solvers on one problem or many: runs, tables, curves, time to target."""

from solvers.compare.runs import compare
from solvers.compare.suite import Suite
from solvers.compare.tables import Comparison

__all__ = ["Comparison", "Suite", "compare"]
