"""Tests of the room `leap`."""
