"""Compiled loops that several solvers share: moves, cooling, local search, repair."""
