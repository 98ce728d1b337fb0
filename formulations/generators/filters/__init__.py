"""Choose filters to prune and bits to remove (arXiv 2505.16332): tables, the QUBO, and the exact counts."""
