"""Ways to store a weight in fewer bytes, one per module."""
