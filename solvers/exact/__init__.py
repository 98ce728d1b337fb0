"""Solvers that prove optimality when given the time."""
