"""Read and write problems in the file formats of other tools."""
