"""Compressed models: applying a choice, the record of it, factored and packed layers, and the model file."""
