"""Choices in opened models, a block in memory at a time: codes written, losses taken."""
