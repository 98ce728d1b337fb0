"""The engine llama.cpp: GGUF files of ggml's tensor types."""
