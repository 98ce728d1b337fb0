"""Filters of a model: the tables are what pruning costs, and a choice becomes exactly the bytes that were predicted."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from formulations import InvalidProblemError
from formulations.generators.filters.counts import filter_counts, fit_size
from formulations.generators.filters.tables import FilterChoice, FilterNetwork, stored_bytes
from qcompress import load_compressed, save_compressed
from qcompress.compressed.apply import apply
from qcompress.errors import ModelError, OptionsError
from qcompress.filters import apply_filters, read_filters
from qcompress.options import Options
from qcompress.transforms.base import Target, Weight
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from qcompress.transforms.quantize.whole_filters import PruneFilters
from solvers import solve
from tests.measurements import KINDS, Chain, measured, option_like, predicted_bytes, solution
from tests.models import Residual, seeded

TIED = [["stem", "body.2"]]


def batch() -> Tensor:
    return torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(0))


def random_choice(network: FilterNetwork, seed: int) -> FilterChoice:
    rng = np.random.default_rng(seed)
    pruned = []
    for one in network.sets:
        mask = np.zeros(len(one.scores), dtype=bool)
        mask[rng.permutation(len(mask))[: rng.integers(0, len(mask))]] = True
        pruned.append(mask)
    bits = rng.integers(network.low_bits, network.high_bits + 1, len(network.layers))
    return FilterChoice(pruned=tuple(pruned), bits=bits)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]))
def test_a_choice_takes_the_predicted_bytes_and_comes_back_bit_for_bit(seed: int, dtype: torch.dtype) -> None:
    model, data = seeded(Residual).to(dtype), [batch().to(dtype)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tables = read_filters(model, data, tied=TIED, bits=(2, 9))
    choice = random_choice(tables.network, seed)
    smaller = apply_filters(model, tables, choice)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for one, pruned in zip(tables.network.sets, choice.pruned, strict=True):
        for place in one.layers:
            rows, original = tables.parts[place].weight(smaller), tables.parts[place].weight(model)
            kept = torch.from_numpy(~pruned)
            target = Target(layer="Conv2d", channels=int(kept.sum()), per_channel=rows.shape[1], dtype=dtype, macs=0)
            expected = PruneQuantize(int(choice.bits[place])).approximate(Weight(original[kept], target))
            assert torch.equal(rows[kept], expected)
            assert not rows[~kept].any()
    with tempfile.TemporaryDirectory() as folder:
        saved = save_compressed(smaller, Path(folder) / "small.safetensors")
        assert saved.payload_bytes == tables.network.evaluate(choice).size_bytes
        loaded = load_compressed(saved.path, lambda: seeded(Residual, 1).to(dtype))
    assert all(torch.equal(tensor, smaller.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_the_whole_way_stays_within_the_budget() -> None:
    model = seeded(Residual)
    tables = read_filters(model, [batch()], tied=TIED)
    budget = tables.network.fixed_bytes + 150
    counts = filter_counts(tables.network, budget)
    found = solve(counts.problem, "dp")
    smaller = apply_filters(model, tables, counts.decode(found.choice), batch_norm_data=[batch()])
    with tempfile.TemporaryDirectory() as folder:
        assert save_compressed(smaller, Path(folder) / "small.safetensors").payload_bytes == found.usage["bytes"]
    assert found.usage["bytes"] <= budget
    assert not torch.equal(smaller.norm.running_mean, model.norm.running_mean)
    gamma, _ = fit_size(tables.network, budget)
    assert gamma > 0


def test_tied_layers_share_a_set_whose_scores_add_up() -> None:
    model = seeded(Residual)
    tables = read_filters(model, [batch()], tied=TIED)
    assert [one.name for one in tables.network.sets] == ["stem + body.2", "body.0"]
    stem, last = (model.get_submodule(name).weight.detach() for name in ("stem", "body.2"))
    expected = stem.abs().mean((1, 2, 3)) + last.abs().mean((1, 2, 3))
    np.testing.assert_allclose(tables.network.sets[0].scores, expected, rtol=1e-5)


class Scaled(nn.Module):
    """Two convolutions around an activation that a factor passes through."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 5, 3, bias=False)
        self.second = nn.Conv2d(5, 4, 3, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))).mean((2, 3)))


def test_fisher_scores_do_not_change_when_layers_are_scaled_but_l1_scores_do() -> None:
    model, scaled = seeded(Scaled), seeded(Scaled)
    with torch.no_grad():
        scaled.first.weight *= 8.0
        scaled.second.weight /= 8.0
    for scores, same in (("fisher", True), ("l1", False)):
        tables = [read_filters(one, [batch()], scores=scores).network.layers for one in (model, scaled)]
        for one, other in zip(*tables, strict=True):
            assert np.allclose(one.scores, other.scores, rtol=1e-3) is same
            assert bool(np.isclose(one.bit_score, other.bit_score, rtol=1e-3)) is same


def test_a_fisher_score_is_the_root_of_the_loss_of_pruning_the_filter() -> None:
    model = seeded(Scaled)
    tables = read_filters(model, [batch()], scores="fisher")
    with torch.no_grad():
        reference = model(batch()).double().log_softmax(1)
        for index in range(4):  # nothing but linear layers behind them, so that nothing is left out
            weight = model.second.weight[index].clone()
            model.second.weight[index] = 0.0
            output = model(batch()).double().log_softmax(1)
            model.second.weight[index] = weight
            loss = (reference.exp() * (reference - output)).sum(1).mean()
            assert tables.network.layers[1].scores[index] ** 2 == pytest.approx(float(loss), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_transform_suits_every_kind_of_layer(kind: str) -> None:
    torch.manual_seed(0)
    make, make_batch = KINDS[kind]
    model, inputs = make().eval(), make_batch()
    measurement = measured(model, inputs, Options((PruneFilters(bits=5, num_pruned=2),)))
    choice = option_like(measurement, "prune_filters")
    smaller = apply(model, measurement, solution(choice))
    for part in measurement.parts:
        norms = part.weight(model).double().abs().sum(1)
        gone = (part.weight(smaller) == 0).all(dim=1)
        assert bool(gone[norms.argsort(stable=True)[:2]].all())
    with tempfile.TemporaryDirectory() as folder:
        saved = save_compressed(smaller, Path(folder) / "small.safetensors")
        assert saved.payload_bytes == predicted_bytes(measurement, choice)
        loaded = load_compressed(saved.path, make)
    assert torch.equal(loaded.eval()(inputs), smaller(inputs))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 16), st.data())
def test_bytes_are_those_of_the_formulation(filters: int, weights: int, bits: int, data: st.DataObject) -> None:
    pruned = data.draw(st.integers(0, filters))
    target = Target(layer="Conv2d", channels=filters, per_channel=weights, dtype=torch.float32, macs=0)
    transform = PruneFilters(bits=bits, num_pruned=pruned)
    stored = transform.encode(Weight(torch.randn(filters, weights), target))
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size == transform.size_bytes(target) == stored_bytes(filters, weights, pruned, bits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": "l2"}, "scores must be one of l1, fisher, found 'l2'"),
        ({"bits": (1, 8)}, "bits must be a whole number from 2 to 16, found 1"),
        ({"tied": [["stem", "tail"]]}, "'tail', which is not one of the layers; there are: stem, body.0, body.2"),
        ({"tied": [["stem", "body.2"], ["stem"]]}, "'stem' twice"),
        ({"tied": ["stem"]}, "groups of layer names"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        read_filters(seeded(Residual), [batch()], **changes)  # type: ignore[arg-type]


def test_what_does_not_belong_together_is_refused() -> None:
    model = seeded(Residual)
    with pytest.raises(ModelError, match="no Conv2d"):
        read_filters(Chain(nn.Linear(3, 3)), [torch.randn(2, 3)])
    with pytest.raises(InvalidProblemError, match="tied layers must have equally many filters"):
        read_filters(seeded(Scaled), [batch()], tied=[["first", "second"]])
    tables = read_filters(model, [batch()])
    with pytest.raises(InvalidProblemError, match="prunes every filter"):
        all_gone = tuple(np.ones(6, dtype=bool) for _ in range(3))
        apply_filters(model, tables, FilterChoice(pruned=all_gone, bits=np.full(3, 4)))
    with pytest.raises(ModelError, match="not the model that was measured"):
        apply_filters(seeded(Residual, 1), tables, random_choice(tables.network, 0))


@pytest.mark.parametrize("wrong", [-1, 1.5, True])
def test_a_number_of_filters_that_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(OptionsError, match="num_pruned must be a whole number"):
        PruneFilters(bits=4, num_pruned=wrong)  # type: ignore[arg-type]
