"""Tests of the room `compressed`."""
