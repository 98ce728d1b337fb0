"""A problem seen through a smaller one with the same answer, and the way back."""
