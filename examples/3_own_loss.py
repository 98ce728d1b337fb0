"""
Your own loss, your own options for some layers
===============================================

Give any function ``(output, batch) -> one number a sample`` as the loss, and say which options are on offer.
"""

# %%
# A regression whose errors count relatively
# ------------------------------------------

import torch
from torch import Tensor, nn

import qcompress
from qcompress import low_rank, prune_quantize

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)).eval()
inputs = torch.randn(512, 16)
with torch.no_grad():
    targets = model(inputs) + 0.01 * torch.randn(512, 2)
data = list(zip(inputs.split(64), targets.split(64), strict=True))


def relative_error(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """``(N, 2)`` outputs → ``(N,)`` squared errors relative to the targets' size."""
    targets = batch[1]
    return ((output - targets) ** 2).sum(1) / ((targets**2).sum(1) + 0.1)


# %%
# Options add up
# --------------
# Every layer chooses among low ranks and bit-widths; keeping it as it is, is always among the options.

options = low_rank(ratios=(0.25, 0.5, 0.75)) + prune_quantize(bits=(3, 4, 6, 8), sparsity=(0,))
measurement = qcompress.measure(model, data, options, loss=relative_error)
for part, labels in zip(measurement.parts, measurement.labels, strict=True):
    print(f"{part.name:3} {', '.join(labels)}")

# %%
# One measurement, many budgets
# -----------------------------
# Measuring is the expensive step. A problem for another budget, or another solver, takes no time.

for share in (0.3, 0.2, 0.15):
    problem = qcompress.formulate(measurement, {"bytes": share})
    solution = qcompress.solve(problem, time_limit=5)
    smaller = qcompress.apply(model, measurement, solution)
    measured = qcompress.mean_loss(model, smaller, data, loss=relative_error)
    print(f"{share:4.0%} of the bytes: predicted {solution.objective:.2e}, measured {measured:.2e}, {solution.status}")
