"""Importing this loads and compiles what the solvers of a portfolio need: processes forked after it need not do so."""

import solvers.composites.auto
from solvers.kernels.warm import warm

__all__ = ["solvers"]

warm()
