"""Tests of the room `heuristic`."""
