"""Costs averaged over further samples are those of all samples, with the options encoded as they were."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import mean_loss, measure, prune_quantize
from qcompress.compressed.apply import apply
from qcompress.formulation import formulate
from qcompress.measuring.pooled import with_more_samples
from qcompress.measuring.progress import MeasureProgress
from qcompress.model.calibration import Calibration
from qcompress.model.losses import as_loss
from solvers import judge
from tests.models import Residual, seeded

BITS = prune_quantize(bits=(2, 4), sparsity=(0,))


def batches(sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(size, 2, 5, 5, generator=generator) for size in sizes]


def calibration(model: nn.Module, data: list[Tensor], loss: str = "kl") -> Calibration:
    return Calibration(model=model, data=data, forward=None, loss=as_loss(loss), seed=0)


@pytest.mark.parametrize("method", ["fisher", "direct", "sampled"])
@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_costs_and_pair_terms_over_more_samples_are_those_of_all(method: str, loss: str) -> None:
    model, data = seeded(Residual), batches((9, 7, 5))
    first = measure(model, data[:2], BITS, method=method, loss=loss)
    pooled = with_more_samples(calibration(model, data[2:], loss), first)
    whole = measure(model, data, BITS, method=method, loss=loss)
    assert pooled.num_samples == whole.num_samples == 21
    if method == "sampled":  # batches draw their random numbers by their place: estimates of the same costs
        near = 5 * np.asarray(whole.standard_error) + 1e-12
        assert (np.abs(pooled.cost - whole.cost) <= near).all()
        np.testing.assert_allclose(pooled.standard_error, whole.standard_error, rtol=1.0)
        assert pooled.factor.shape == whole.factor.shape
        return
    np.testing.assert_allclose(pooled.cost, whole.cost, rtol=1e-4, atol=1e-9)  # float32 sums in another order
    if whole.softened is not None:
        np.testing.assert_allclose(pooled.softened, whole.softened, rtol=1e-4, atol=1e-9)
    second = whole.factor @ whole.factor.T
    np.testing.assert_allclose(pooled.factor @ pooled.factor.T, second, rtol=1e-3, atol=1e-4 * second.max())


def test_codes_stay_those_of_the_first_samples() -> None:
    model, data = seeded(Residual), batches((9, 7, 5))
    options = prune_quantize(bits=(2, 3), sparsity=(0,), compensated=True)
    first = measure(model, data[:2], options, method="direct")
    pooled = with_more_samples(calibration(model, data[2:]), first)
    problem = formulate(first, {"bytes": 1.0})
    for part, part_options in enumerate(first.transforms):
        for option in range(len(part_options)):
            choice = np.zeros(problem.num_groups, dtype=np.int64)
            choice[part] = option
            smaller = apply(model, first, judge(problem, choice))  # encoded by the moments of the first samples
            flat = problem.flat(choice)[part]
            assert pooled.cost[flat] == pytest.approx(mean_loss(model, smaller, data), rel=1e-3, abs=1e-7)
    assert pooled.moments is first.moments


def test_more_samples_that_were_cut_go_on_from_the_last_batch(tmp_path: Path) -> None:
    model, data = seeded(Residual), batches((9, 7, 5))
    first = measure(model, data[:1], BITS)
    expected = with_more_samples(calibration(model, data[1:]), first)

    def cut(progress: MeasureProgress) -> None:
        if progress.batches == 2:
            raise KeyboardInterrupt

    cache = tmp_path / "more"
    with pytest.raises(KeyboardInterrupt):
        with_more_samples(calibration(model, data[1:]), first, cache=cache, on_progress=cut)
    again = with_more_samples(calibration(model, data[1:]), replace(first, codes={}), cache=cache)
    np.testing.assert_array_equal(again.cost, expected.cost)
    np.testing.assert_array_equal(again.factor, expected.factor)
    assert not cache.exists()
