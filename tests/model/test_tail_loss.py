"""The loss that weighs unsure samples: weights by the original's margin, curvature that fits, names."""

import pytest
import torch
from torch import nn

from qcompress import compress, mean_loss, measure, prune_quantize
from qcompress.errors import OptionsError
from qcompress.model.losses import KullbackLeibler, as_loss
from qcompress.model.tail_loss import TailWeighted


def outputs(samples=6, classes=4, seed=0, positions=()):
    return torch.randn((samples, *positions, classes), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("positions", [(), (5,)])
def test_each_position_s_divergence_is_weighted_by_the_original_s_margin(positions):
    reference, output = outputs(positions=positions), outputs(seed=1, positions=positions)
    p, q = reference.softmax(-1), output.softmax(-1)
    top = p.log().topk(2, dim=-1).values
    weights = 1 / (1 + top[..., 0] - top[..., 1]) ** 3
    expected = ((p * (p / q).log()).sum(-1) * weights).reshape(6, -1).mean(1)
    assert torch.allclose(TailWeighted(3.0).rise(output, reference, None), expected)


def test_a_tie_counts_in_full_and_a_sure_answer_little():
    reference = torch.tensor([[1.0, 1.0, -9.0], [9.0, 0.0, -9.0]], dtype=torch.float64)
    output = reference + torch.tensor([0.1, -0.1, 0.0])
    losses = (KullbackLeibler(), TailWeighted(2.0))
    plain, weighted = (loss.rise(output, reference, None).tolist() for loss in losses)
    assert weighted[0] == pytest.approx(plain[0])
    assert weighted[1] == pytest.approx(plain[1] / 100, rel=0.01)


def test_effects_and_probes_are_half_the_curvature_of_small_changes():
    loss, reference = TailWeighted(2.0), outputs()
    change = 1e-4 * outputs(seed=2)
    rise = loss.rise(reference + change, reference, None)
    effects = loss.effects(change[None], reference, None)[0]
    assert torch.allclose(rise, 0.5 * effects.square().sum(-1), rtol=1e-3)
    many = [loss.probes(reference, None, torch.Generator().manual_seed(seed)) for seed in range(400)]
    squares = torch.stack([(probes * change).sum(-1).square().sum(0) for probes in many]).mean(0)
    assert torch.allclose(squares, effects.square().sum(-1), rtol=0.3)


def test_the_gradient_is_that_of_the_weighted_divergence():
    loss, reference, point = TailWeighted(2.0), outputs(), outputs(seed=1).requires_grad_(True)
    expected = torch.autograd.grad(loss._divergence(point, reference).sum(), point)[0]
    assert torch.allclose(loss.gradient(point.detach(), None, reference), expected)
    assert loss.gradient(reference, None) is None


def test_names_give_strengths_and_odd_ones_are_refused():
    assert as_loss("kl-tail").name == "kl-tail:2"
    assert as_loss("kl-tail:0.5").name == "kl-tail:0.5"
    with pytest.raises(OptionsError, match="use 'kl'"):
        as_loss("kl-tail:0")
    with pytest.raises(OptionsError, match="loss must be"):
        as_loss("kl-tail:much")


@pytest.mark.parametrize("method", ["fisher", "direct"])
def test_a_model_is_measured_and_compressed_with_it(method, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    data = list(torch.randn(4, 16, 8).unbind())
    options = prune_quantize(bits=(2, 4, 8), sparsity=(0,))
    found = measure(model, data, options, method=method, loss="kl-tail")
    plain = measure(model, data, options, method=method)
    assert found.loss == "kl-tail:2"
    assert (found.cost[found.cost > 0] < plain.cost[found.cost > 0]).all()  # weights are at most 1
    result = compress(model, data, options=options, budget={"bytes": 0.4}, loss="kl-tail", solver="greedy")
    assert mean_loss(model, result.model, data, loss="kl-tail") > 0
