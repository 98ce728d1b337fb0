"""Tests of the room `measuring.inputs`."""
