"""Solvers that prove optimality if given enough time."""
