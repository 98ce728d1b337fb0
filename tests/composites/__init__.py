"""Tests of the room `composites`."""
