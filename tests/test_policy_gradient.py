"""The baseline from reinforcement learning: its gradient is that of the expected loss, and it learns."""

import itertools

import numpy as np
import torch

from benchmarks.policy_gradient import Policy, PolicyGradient
from formulations.generators.random_instances import layered_problem
from solvers import solve


def test_the_gradient_is_that_of_the_expected_loss() -> None:
    rng, offsets = np.random.default_rng(0), np.array([0, 2, 5])
    choices = np.array(list(itertools.product(range(2), range(3))))
    losses, policy = rng.normal(size=len(choices)), Policy(offsets)
    policy.logits[:] = np.where(np.isinf(policy.logits), -np.inf, rng.normal(size=(2, 3)))
    probabilities = policy.probabilities()
    shares = probabilities[0, choices[:, 0]] * probabilities[1, choices[:, 1]]
    logits = torch.tensor(policy.logits, requires_grad=True)
    by_torch = logits.softmax(1)
    (torch.tensor(losses) * by_torch[0, choices[:, 0]] * by_torch[1, choices[:, 1]]).sum().backward()
    assert logits.grad is not None
    wanted = logits.grad.nan_to_num().numpy()
    count = 200_000
    drawn = policy.draw(rng, count)
    places = drawn[:, 0] * 3 + drawn[:, 1]
    frequencies = np.bincount(places, minlength=6) / count
    # six standard errors of a frequency
    assert np.all(abs(frequencies - shares) < 6 * np.sqrt(shares * (1 - shares) / count))
    found = policy.gradient(drawn, losses[places]) * losses[places].std()
    # six standard errors of a mean of count terms, each below the range of the losses
    np.testing.assert_allclose(found, wanted, atol=6 * np.ptp(losses) / np.sqrt(count))
    assert abs(wanted).max() > 20 * np.ptp(losses) / np.sqrt(count)


def test_it_learns_and_keeps_the_budget() -> None:
    problem = layered_problem(8)
    best = solve(problem, "milp").objective
    short, long = (solve(problem, PolicyGradient(steps=steps), seed=0) for steps in (1, 500))
    assert long.feasible
    assert best is not None
    assert short.objective is not None
    assert long.objective is not None
    assert best <= long.objective < short.objective
