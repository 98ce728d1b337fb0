"""ggml's block formats as transforms: the table of types, ggml's own library, and the transform."""
