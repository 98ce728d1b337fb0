"""Engines: what a compressed model is written for, sized for and run by. One engine a file, one line in `registry`."""
