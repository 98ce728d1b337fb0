"""Fewer bits: pruning, quantization, compensation, packed codes."""
