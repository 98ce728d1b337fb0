"""One-hot encoding: a bit per option, with the penalty ``P_g·(Σ x_v − 1)²``.

**Sufficient penalties.** Take any x, in which n_g options of group g are on. Replace it by a valid x': a group with
n_g ≥ 1 keeps a random one of its options that are on, an empty group takes one fixed option v. Write m = n − 1 and let
−β_gh be the most negative pair term between g and h (0 if there is none). The expected energy of x' is lower than that
of x by at least

    Σ_{n_g ≥ 1} m_g²·(P_g − (3/2)·Σ_h β_gh)  +  Σ_{n_g = 0} (P_g − cost_v − Σ_h max(0, max_{u in h} Q_vu))

because E[Q(x'_g, x'_h)] is the mean of the n_g·n_h pair terms that x pays, n_g·n_h − 1 = m_g + m_h + m_g·m_h, and
2·m_g·m_h ≤ m_g² + m_h². So a P_g that makes both brackets positive makes every ground state valid. Neither condition
can be weaker in general: two groups of two options with all pair terms −β gain 3β by switching everything on, and a
group whose options all have large pair terms with other groups avoids all of them by being empty.
"""

import numpy as np
import scipy.sparse

from formulations.forms.couplings import Couplings, Floats, pairs_within_groups
from formulations.forms.encodings.code import Code
from formulations.forms.penalties import above, largest
from formulations.forms.quadratic import Quadratic
from formulations.problem import Problem


def encode(
    form: Quadratic, problem: Problem, cost: Floats, pairs: Couplings, strength: float | Floats, worth: float
) -> tuple[Quadratic, Code, Floats]:
    """Return the form in bits, the code, and the penalty of every group.

    Args:
        form: the model's energy in x, with one variable per option, followed by other variables.
        problem: the problem that defines the groups.
        cost: ``(V,)`` costs, 0 for the cheapest option of every group.
        pairs: the problem's pair terms.
        strength: penalties relative to the sufficient ones for ``cost`` and ``pairs``; one number, or ``(G,)``.
        worth: number added to every penalty on account of the budgets.
    """
    penalty = strength * sufficient(problem, cost, pairs) + worth
    identity = scipy.sparse.eye_array(problem.num_options, format="csr")
    code = Code(
        matrix=identity,
        constant=np.zeros(problem.num_options),
        words=identity,
        bits=np.arange(problem.num_options),
    )
    return form + _exactly_one(problem, penalty), code, penalty


def sufficient(problem: Problem, cost: Floats, pairs: Couplings) -> Floats:
    """Return penalties ``(G,)`` that make every ground state valid; arguments as in `encode`."""
    num_groups, group_of = problem.num_groups, problem.group_of
    rows, columns, values = pairs
    option, other_group = np.concatenate([rows, columns]), group_of[np.concatenate([columns, rows])]
    blocks, most = largest(option * num_groups + other_group, np.concatenate([values, values]))
    filling = cost + np.bincount(blocks // num_groups, weights=most, minlength=len(cost))
    fill = np.minimum.reduceat(filling, problem.group_offsets[:-1])
    blocks, gain = largest(group_of[rows] * num_groups + group_of[columns], -values)
    left, right = blocks // num_groups, blocks % num_groups
    beta = np.bincount(left, gain, minlength=num_groups) + np.bincount(right, gain, minlength=num_groups)
    return above(np.maximum(fill, 1.5 * beta), cost)


def _exactly_one(problem: Problem, penalty: Floats) -> Quadratic:
    """Return ``Σ_g P_g·(Σ_{v in g} x_v − 1)²``."""
    first, second = pairs_within_groups(problem.group_offsets)
    group_of = problem.group_of
    return Quadratic.of(-penalty[group_of], [(first, second, 2 * penalty[group_of[first]])], float(penalty.sum()))
