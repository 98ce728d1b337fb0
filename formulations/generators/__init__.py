"""What builds a `Problem`: options of layers, ranks, filters, and random instances with the structure of real ones."""
