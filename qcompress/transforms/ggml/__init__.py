"""ggml's block formats as transforms: the table of types, the binding to ggml's library, and the transform."""
