"""Tests of the room `generators`."""
