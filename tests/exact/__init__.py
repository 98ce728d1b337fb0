"""Tests of the room `exact`."""
