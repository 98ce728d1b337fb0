"""How large the numbers of an objective are: back ends see problems divided by it."""

import numpy as np

from formulations import Problem


def objective_size(problem: Problem) -> float:
    """The size of the objective's numbers: the most a single decision or pair can change it; 1 if all are zero.

    Back ends see problems divided by this, so that scores from 1e-12 to 1e9 give the same choice.

    >>> objective_size(Problem(["a"], [["keep", "4 bit"]], [0, 3], {}, {}))
    3.0
    """
    starts = problem.group_offsets[:-1]
    spread = np.maximum.reduceat(problem.cost, starts) - np.minimum.reduceat(problem.cost, starts)
    sizes = [float(spread.max())]
    if problem.pairs.num_sparse:
        sizes.append(float(np.abs(problem.pairs.sparse.data).max()))
    if problem.pairs.factor is not None and problem.pairs.rank:
        sizes.append(float(np.einsum("vr,vr->v", problem.pairs.factor, problem.pairs.factor).max()))
    size = max(sizes)
    return size if size > 0 and np.isfinite(1.0 / size) else 1.0
