"""Random scores have the Fisher information as their second moment, also of networks that are sure of their answer."""

import numpy as np
import pytest
import torch
from torch import nn

import qcompress
from qcompress.model.scores import drawn_scores


def fisher(p: torch.Tensor) -> torch.Tensor:
    return torch.diag(p) - torch.outer(p, p)


@pytest.mark.parametrize("logit", [0.0, 3.0, 15.0, 60.0])
def test_with_two_classes_every_score_has_the_right_square(logit):
    exact = torch.tensor([logit, 0.0], dtype=torch.float64).softmax(0)
    scores = drawn_scores(exact.float().repeat(20, 1), torch.Generator().manual_seed(1)).double()
    products, expected = torch.einsum("ni,nj->nij", scores, scores), exact.prod() * torch.tensor([[1, -1], [-1, 1]])
    assert torch.allclose(products, expected.expand_as(products), rtol=1e-5, atol=0)  # float32


@pytest.mark.parametrize("scale", [0.5, 5.0, 30.0])
def test_squares_are_right_on_average_and_close_to_it(scale):
    generator = torch.Generator().manual_seed(2)
    exact = (scale * torch.randn(9, generator=generator, dtype=torch.float64)).softmax(0)
    change, draws = torch.randn(9, generator=generator, dtype=torch.float64), 20_000
    scores = drawn_scores(exact.float().repeat(draws, 1), generator).double()
    squares, expected = (scores @ change).square(), float(change @ fisher(exact) @ change)
    assert float(squares.std()) < 3 * expected  # labels drawn from p itself: 100 times as much at the last scale
    error = 3 / draws**0.5  # standard error of the mean at that spread, relative
    assert float(squares.mean()) == pytest.approx(expected, rel=4 * error)


def test_scores_of_two_positions_do_not_depend_on_each_other():
    p = torch.tensor([[0.7, 0.2, 0.1]]).repeat(20_000, 1)
    scores = drawn_scores(p, torch.Generator().manual_seed(3)).view(-1, 2, 3)
    products = torch.einsum("ni,nj->ij", scores[:, 0], scores[:, 1]) / len(scores)
    assert float(products.abs().max()) < 0.01  # their standard error is about .003


def test_certain_answers_have_no_score():
    p = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    scores = drawn_scores(p, torch.Generator().manual_seed(4))
    assert scores[0].abs().max() == 0
    assert scores[1].abs().tolist() == [0, 0.5, 0.5]


def test_sampled_costs_of_a_network_that_is_sure_agree_with_direct_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    for parameter in model[2].parameters():
        parameter.data *= 100
    inputs = torch.randn(4000, 16)
    with torch.no_grad():
        sure = model(inputs).softmax(-1).amax(-1) > 0.995
    data, options = [inputs[sure][:128]], qcompress.prune_quantize(bits=(4, 8), sparsity=(0,))
    sampled, direct = (qcompress.measure(model, data, options, method=method) for method in ("sampled", "direct"))
    paid = direct.cost > 0
    assert np.all(sampled.cost[paid] > 0.4 * direct.cost[paid])  # a thousandth when labels were drawn from p
    assert np.all(np.abs(sampled.cost - direct.cost)[paid] < 4 * sampled.standard_error[paid] + 0.2 * direct.cost[paid])
