"""Tests of the room `measuring.methods`."""
