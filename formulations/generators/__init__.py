"""Build a `Problem` from options of layers, ranks or filters, and generate random instances."""
