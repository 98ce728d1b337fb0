"""Random scores of a distribution: their second moments are its Fisher information, ``E[a·aᵀ] = diag(p) - p·pᵀ``.

A score is ``e_y - p`` for a label y drawn from p. Where p is sure of its answer, nearly every drawn label is that
answer, whose score is nearly zero; the rare labels, on which the information rests, are almost never seen. So labels
are drawn from ``q_y ∝ p_y·|e_y - p|²``, their shares of the trace of the information, and the score is multiplied by
``±√(p_y/q_y)``. With two classes, every draw then has the right square. The random sign makes products of scores of
two positions vanish on average.
"""

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Probabilities for which labels are drawn at a time."""


def drawn_scores(p: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``(positions, classes)`` scores for labels drawn at every position; overwrites ``p``.

    >>> a = drawn_scores(torch.tensor([[0.75, 0.25]]), torch.Generator().manual_seed(0))
    >>> (a.mT @ a).tolist()  # p·(1 - p) = 0.1875
    [[0.1875, -0.1875], [-0.1875, 0.1875]]
    """
    largest, top = p.max(-1, keepdim=True)
    others = p.scatter_(-1, top, 0.0)  # in place: outputs can be large
    rest, squares = others.sum(-1, keepdim=True), torch.linalg.vecdot(others, others).unsqueeze(-1)
    of_top = rest.square() + squares  # |e_y - p|² of the likeliest label, where 1 - p would lose all digits
    whole = 1 + largest.square() + squares  # and of another one, but for -2·p
    place = torch.rand(top.shape, generator=generator, dtype=torch.float64).to(p.device)
    drawn = torch.empty_like(top)
    rows = max(1, CHUNK // p.shape[-1])
    for start in range(0, len(p), rows):
        some = slice(start, start + rows)
        shares = torch.addcmul(others[some] * whole[some], others[some], others[some], value=-2)
        shares.scatter_(-1, top[some], (largest * of_top)[some])
        below = shares.cumsum(-1, dtype=torch.float64)
        drawn[some] = torch.searchsorted(below, place[some] * below[:, -1:], right=True).clamp_(max=p.shape[-1] - 1)
    is_top, probability = drawn == top, others.gather(-1, drawn)
    total = whole * rest - 2 * squares + largest * of_top
    length = torch.where(is_top, of_top, whole - 2 * probability)
    factor = (total / length).sqrt().nan_to_num_(0.0)  # 0 / 0 where all other probabilities are too small for a float
    scores = others.neg_().scatter_(-1, top, -largest)
    scores.scatter_(-1, drawn, torch.where(is_top, rest, 1 - probability))
    return scores.mul_(factor * random_signs(tuple(top.shape), p, generator))


def random_numbers(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return normally distributed numbers for a check, in the dtype of ``like``; an accelerator draws its own."""
    if like.device.type != "cuda":
        return torch.randn(shape, generator=generator).to(like)
    seed = int(torch.randint(1 << 62, (), generator=generator))
    there = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=there, device=like.device).to(like)


def random_signs(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs, drawn on the CPU so that they are the same for every device."""
    drawn = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    return drawn.to(like.device, like.dtype) * 2 - 1
