"""A model as the library sees it: its layers, its parts, how it runs and what its loss is."""
