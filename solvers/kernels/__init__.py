"""Compiled loops shared by several solvers: moves, cooling, local search, repair."""
