"""Inference engines that compressed models are exported to. One engine per file, one line in `registry`."""
