"""Tests of `qcompress.model`."""
