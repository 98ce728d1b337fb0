"""Proven lower bounds by Lagrangian duals, message passing, semidefinite relaxation and Pareto lists."""
