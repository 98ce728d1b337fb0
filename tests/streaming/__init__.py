"""Opened models: choices written and tried."""
