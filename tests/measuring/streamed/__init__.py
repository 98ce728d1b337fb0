"""Tests of the room `measuring.streamed`."""
