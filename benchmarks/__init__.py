"""Measurements of quality, speed and memory, each with one command; see README.md here."""
