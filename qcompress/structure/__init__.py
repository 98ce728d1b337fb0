"""Channels that can be removed: which belong together, what removing them takes, and the smaller network."""
