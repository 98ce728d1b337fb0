"""Forms that solvers take: binary, constrained and nonlinear models and integer programs, with maps back to choices."""
