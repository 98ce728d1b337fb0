"""Tests of the room `feasibility`."""
