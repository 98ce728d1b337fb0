"""Tests of `qcompress.engines`."""
