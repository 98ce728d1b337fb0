"""Statistics of the layers' inputs and outputs that options are fitted to: second moments, squares, ranges."""
