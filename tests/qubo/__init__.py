"""Tests of the room `qubo`."""
