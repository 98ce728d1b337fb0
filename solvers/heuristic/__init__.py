"""Heuristic solvers, which search the space of choices directly."""
