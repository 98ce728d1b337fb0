"""Measuring block by block, for models whose weights are read from files."""
