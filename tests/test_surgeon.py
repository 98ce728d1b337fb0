"""WoodFisher's arithmetic in the benchmarks: what a dense inverse and a dense quadratic model give."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.surgeon import Fisher, kept_in_all, kept_in_each, per_sample_gradients

DAMPING, SIZE = 1e-3, 7


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(70, 2, 4, 4), torch.randint(3, (70,))


@pytest.fixture(scope="module")
def fisher() -> Fisher:
    model, names = network(), ["0.weight", "3.weight"]
    fisher = Fisher({name: model.get_parameter(name) for name in names}, SIZE)
    for gradients in per_sample_gradients(model, names, *images()):
        fisher.add(gradients)
    return fisher


@pytest.fixture(scope="module")
def dense() -> dict[str, np.ndarray]:
    """``H`` of every weight by a loop over samples: zero between blocks."""
    model, (inputs, labels) = network(), images()
    every: dict[str, list[np.ndarray]] = {"0.weight": [], "3.weight": []}
    for sample, label in zip(inputs, labels, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(sample[None]), label[None]).backward()
        for name, rows in every.items():
            rows.append(model.get_parameter(name).grad.double().flatten().numpy())
    found = {}
    for name, rows in every.items():
        gradients = np.array(rows)
        block = np.arange(gradients.shape[1]) // SIZE
        whole = gradients.T @ gradients / len(gradients)
        found[name] = whole * (block[:, None] == block) + DAMPING * np.eye(len(whole))
    return found


def test_scores_are_those_of_the_dense_inverse(fisher, dense):
    plain, diagonal = fisher.scores(DAMPING), fisher.diagonal_scores()
    for name, h in dense.items():
        squares = fisher.weights[name].numpy() ** 2
        np.testing.assert_allclose(plain[name], squares / 2 / np.diag(np.linalg.inv(h)), rtol=1e-4)
        np.testing.assert_allclose(diagonal[name], squares / 2 * (np.diag(h) - DAMPING), rtol=1e-4)
    assert fisher.mean_diagonal() == pytest.approx(
        np.concatenate([np.diag(h) for h in dense.values()]).mean() - DAMPING, rel=1e-4
    )


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("kept_in", [kept_in_each, kept_in_all])
def test_the_update_is_the_brain_surgeons_for_all_removals_together(fisher, dense, sparsity, kept_in):
    kept = kept_in(fisher.scores(DAMPING), sparsity)
    updated = fisher.updated(kept, DAMPING)
    for name, h in dense.items():
        weights, gone = fisher.weights[name].numpy(), ~kept[name].numpy()
        inverse = np.linalg.inv(h)
        move = -inverse[:, gone] @ np.linalg.solve(inverse[np.ix_(gone, gone)], weights[gone])
        np.testing.assert_allclose(updated[name], weights + move, rtol=1e-4, atol=1e-7)
        assert (updated[name][torch.from_numpy(gone)] == 0).all()


def test_the_update_lowers_the_quadratic_model_and_a_single_removal_costs_its_score(fisher, dense):
    kept = kept_in_each(fisher.scores(DAMPING), 0.6)
    updated, scores = fisher.updated(kept, DAMPING), fisher.scores(DAMPING)
    for name, h in dense.items():
        weights = fisher.weights[name].numpy()
        plain, moved = weights * kept[name].numpy() - weights, updated[name].numpy() - weights
        assert moved @ h @ moved < 0.99 * (plain @ h @ plain)
        for place in (0, len(weights) - 1):
            alone = {other: torch.ones(len(mask), dtype=torch.bool) for other, mask in kept.items()}
            alone[name][place] = False
            change = fisher.updated(alone, DAMPING)[name].numpy() - weights
            assert change @ h @ change / 2 == pytest.approx(float(scores[name][place]), rel=1e-4)


def test_large_damping_ranks_by_magnitude_and_moves_nothing(fisher):
    kept = kept_in_all(fisher.scores(1e9), 0.5)
    by_magnitude = kept_in_all({name: weight.abs() for name, weight in fisher.weights.items()}, 0.5)
    updated = fisher.updated(kept, 1e9)
    for name, weight in fisher.weights.items():
        assert torch.equal(kept[name], by_magnitude[name])
        torch.testing.assert_close(updated[name], weight * kept[name])


def test_rankings_remove_the_lowest_scores_and_equally_many():
    scores = {"a": torch.arange(10.0), "b": torch.arange(7.0) + 100}
    each, together = kept_in_each(scores, 0.5), kept_in_all(scores, 0.5)
    assert [int((~mask).sum()) for mask in each.values()] == [5, 3]
    assert [int((~mask).sum()) for mask in together.values()] == [8, 0]
    assert each["a"].tolist() == [False] * 5 + [True] * 5
