"""Solvers that search the choice space itself."""
