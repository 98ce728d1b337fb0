"""Whatever network a seed draws: each option alone does what it is predicted to do."""

import copy

import numpy as np
import pytest

from qcompress import measure, prune_quantize
from qcompress.errors import QcompressError
from qcompress.measuring.true_loss import mean_loss
from tests.odd_networks import KINDS, Odd, odd_network

FINE = prune_quantize(bits=(8,), sparsity=(0,))
FEW, MANY = (*range(14), 22, 24, 35), 2000


def differences(odd: Odd, method: str, granularity: str | int) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true mean losses of every option alone, the latter from copies of the network."""
    measurement = measure(odd.model, odd.data, FINE, method=method, loss=odd.loss, granularity=granularity)
    true = []
    for part, weight, options in zip(
        measurement.parts, measurement.weights(odd.model), measurement.transforms, strict=True
    ):
        for option in options:
            changed = copy.deepcopy(odd.model)
            site = part.site(changed)
            rows = site.rows.clone()
            start, stop = part.rows or (0, len(rows))
            rows[start:stop] = option.approximate(weight)
            site.put_(rows)
            true.append(mean_loss(odd.model, changed, odd.data, loss=odd.loss))
    return measurement.cost, np.array(true)


def check(seed: int) -> None:
    odd = odd_network(seed)
    granularity = ("layer", 2, 4)[seed % 3]
    for method in ("direct", "fisher"):
        try:
            predicted, true = differences(odd, method, granularity)
        except QcompressError as error:
            pytest.fail(f"seed {seed}, {odd.blocks}: refused by {method}: {error}")
        # tried options are exact up to float32; 8 bits change a layer by half a per cent, so that the second order
        # tells a cost to within some per cent, and the largest cost of a network bounds what the small ones leave out
        slack = (1e-3 if method == "direct" else 0.1) * true + (1e-5 if method == "direct" else 5e-3) * true.max()
        wrong = np.abs(predicted - true) > slack + 1e-12
        assert not wrong.any(), (
            f"seed {seed}, {odd.blocks}, {odd.loss}, {granularity}, {method}: {predicted[wrong]} {true[wrong]}"
        )


@pytest.mark.parametrize("seed", FEW)
def test_single_changes_of_odd_networks_are_predicted_as_they_are(seed: int) -> None:
    check(seed)


def test_these_networks_hold_every_kind_of_block() -> None:
    assert {kind for seed in FEW for kind in odd_network(seed).blocks} == set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, MANY, 100))
def test_single_changes_of_many_odd_networks_are_predicted_as_they_are(start: int) -> None:
    for seed in range(start, start + 100):
        check(seed)
