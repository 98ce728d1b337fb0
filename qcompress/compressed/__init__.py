"""A compressed model: its record, its factored layers, its file, and how a choice is put in place."""
