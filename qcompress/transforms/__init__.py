"""Ways to store a weight in fewer bytes, one a module."""
