"""Solvers that sample the QUBO: annealers and every other dimod sampler."""
