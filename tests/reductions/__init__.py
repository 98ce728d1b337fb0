"""Tests of the room `reductions`."""
