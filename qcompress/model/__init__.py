"""The view of a model: its layers and parts, how it is run, and the loss."""
