"""Solvers that run other solvers."""
