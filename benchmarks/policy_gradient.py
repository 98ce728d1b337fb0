"""A baseline from reinforcement learning: a policy that draws an option of every group, trained by policy gradients.

The policy is a softmax over the options of each group. The gradient of the expected objective is estimated from drawn
choices and their objectives (REINFORCE, https://doi.org/10.1007/BF00992696, with the batch's mean and standard
deviation as the baseline and the scale), and Adam follows it. A choice above a budget pays for its excess.

`qcompress compare problem.npz --solver benchmarks.policy_gradient:PolicyGradient` runs it as any other solver.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from formulations import Problem
from solvers.base import Search, Solver
from solvers.kernels.moves import judge_all, to_arrays

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

PENALTY = 10.0
"""Price of a budget's unit, in standard deviations of the objective of the first drawn choices."""

DECAYS = 0.9, 0.999
"""Decay rates of Adam's means (arXiv 1412.6980)."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Solver):
    """REINFORCE with Adam.

    Attributes:
        steps: number of updates of the policy.
        samples: choices that are drawn for an update.
        rate: Adam's step size of the logits.

    >>> from solvers import solve
    >>> from formulations.generators.random_instances import layered_problem
    >>> solve(layered_problem(5), PolicyGradient(steps=50), seed=0).feasible
    True
    """

    name: ClassVar[str] = "policy-gradient"
    summary: ClassVar[str] = "a softmax policy over the options of each group, trained by policy gradients"
    minima: ClassVar[Mapping[str, int]] = {"steps": 1, "samples": 2}
    steps: int = 1000
    samples: int = 64
    rate: float = 0.1

    def run(self, problem: Problem, search: Search) -> None:
        """Draw, judge and update until the steps or the time are over."""
        arrays, policy = to_arrays(problem), Policy(problem.group_offsets)
        means, squares, price = np.zeros_like(policy.logits), np.zeros_like(policy.logits), None
        for step in range(1, self.steps + 1):
            if search.expired():
                return
            drawn = policy.draw(search.rng, self.samples)
            values, excess = judge_all(arrays, drawn + problem.group_offsets[:-1])
            if price is None:
                price = PENALTY * values.std()
            losses = values + price * excess
            search.offer(drawn[losses.argmin()])
            gradient = policy.gradient(drawn, losses)
            means += (1.0 - DECAYS[0]) * (gradient - means)
            squares += (1.0 - DECAYS[1]) * (gradient**2 - squares)
            scale = np.sqrt(squares / (1.0 - DECAYS[1] ** step)) + 1e-12
            policy.logits -= self.rate * means / (1.0 - DECAYS[0] ** step) / scale
        search.offer(policy.logits.argmax(axis=1))


class Policy:
    """Independent choices of an option in every group.

    Attributes:
        logits: ``(G, O)``, O being the largest number of options; minus infinity where a group has fewer.
    """

    def __init__(self, group_offsets: Integers) -> None:
        sizes = np.diff(group_offsets)
        self.logits = np.where(np.arange(sizes.max()) < sizes[:, None], 0.0, -np.inf)

    def probabilities(self) -> Floats:
        """Probabilities ``(G, O)`` of the options."""
        odds = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return np.asarray(odds / odds.sum(axis=1, keepdims=True))

    def draw(self, rng: np.random.Generator, count: int) -> Integers:
        """Draw ``(count, G)`` local options."""
        ends = self.probabilities().cumsum(axis=1)
        ends /= ends[:, -1:]
        return np.asarray((rng.random((count, len(ends), 1)) >= ends).sum(axis=2))

    def gradient(self, drawn: Integers, losses: Floats) -> Floats:
        """Estimate ``(G, O)``, the gradient of the mean loss, in standard deviations of the losses."""
        advantages = (losses - losses.mean()) / (losses.std() or 1.0)
        pulled, groups = np.zeros_like(self.logits), np.arange(drawn.shape[1])
        np.add.at(pulled, (groups, drawn), np.broadcast_to(advantages[:, None], drawn.shape))
        return np.asarray(pulled / len(losses))
