"""The engine llama.cpp: GGUF files with ggml's tensor types."""
