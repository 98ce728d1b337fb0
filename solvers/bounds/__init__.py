"""Proven lower bounds: Lagrangian duals, message passing, semidefinite, Pareto lists."""
