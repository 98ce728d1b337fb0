"""The forms that solvers take: binary, constrained and nonlinear models, integer programs, each with its way back."""
