"""Load and compile on import what the solvers of a portfolio need, so that forked processes need not do so."""

import solvers.composites.auto
from solvers.kernels.warm import warm

__all__ = ["solvers"]

warm()
