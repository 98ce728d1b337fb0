"""
The same problem as a QUBO, and on its way to D-Wave
====================================================

Every problem can be written as a binary quadratic model, a constrained model or a nonlinear model, and handed to any
dimod sampler. Nothing on this page needs an account.
"""

# %%
# A problem with pair terms
# -------------------------

import dimod

import formulations
import solvers
from formulations.generators.random_instances import layered_problem

problem = layered_problem(num_groups=12, rank=4, seed=0)
print(problem)

# %%
# Encodings
# ---------
# One-hot needs a bit for every option; domain-wall one less per group, and weaker penalties.

for encoding in ("one-hot", "domain-wall", "binary"):
    encoded = formulations.to_bqm(problem, encoding=encoding)
    bqm = encoded.bqm
    print(f"{encoding:12} {bqm.num_variables:4} bits, {bqm.num_interactions:5} couplings")

# %%
# Solvers side by side
# --------------------
# The bound comes from an exact solver, so every heuristic's distance from the optimum is known.

proof = solvers.solve(problem, "auto", time_limit=10)
print(f"auto: {proof.objective:.4f} {proof.status}, gap {proof.gap:.2%}")
for name in ("sa", "anneal", "ga"):
    solution = solvers.solve(problem, name, time_limit=2, seed=0)
    above = (solution.objective - proof.bound) / abs(proof.bound)
    print(f"{name:7} {solution.objective:.4f}, {above:.2%} above the bound")

# %%
# Any dimod sampler
# -----------------
# A sampler, or a composite of samplers, is a solver as it is: samples are decoded, repaired and polished, and what each
# step brought is in ``details``.

solution = solvers.solve(problem, dimod.SimulatedAnnealingSampler(), time_limit=2, seed=0)
print(f"dimod's sampler: {solution.objective:.4f}")

# %%
# D-Wave Leap
# -----------
# With the extra ``dwave`` and an account, ``solvers.solve(problem, "leap-cqm")`` sends it to the hybrid solver, and
# ``wait=False`` gives a job that outlives the process. On the command line::
#
#     qcompress leap submit problem.npz --solver leap-cqm --dry-run     # size, least time, charge; nothing is sent
#     qcompress leap submit problem.npz --solver leap-cqm --time-limit 10
#     qcompress leap fetch JOB
