"""Removable channels: which channels are coupled, what removing them saves, and the smaller network."""
