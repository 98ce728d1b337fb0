"""Reductions of a problem to a smaller equivalent one, and maps of solutions back to the original."""
