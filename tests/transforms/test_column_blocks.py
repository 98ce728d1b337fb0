"""Wide layers: moments in blocks of columns do what the block-diagonal matrix of the whole would do."""

import pytest
import torch
from torch import Tensor, nn

from qcompress import apply, formulate, low_rank, mean_loss, measure, prune_quantize, solve
from qcompress.options import Options
from qcompress.transforms.base import Target, Weight
from qcompress.transforms.column_blocks import block_size, products, spans, times
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.compensation import shrunk
from qcompress.transforms.quantize.group_wise import GroupWise
from qcompress.transforms.quantize.prune_quantize import PruneQuantize

WIDTH, SIZE = 42, 16


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 columns from 33 on."""
    for name, value in (("MAX_INPUTS", 32), ("BLOCK_INPUTS", SIZE), ("STEP", 8)):
        monkeypatch.setattr(f"qcompress.transforms.column_blocks.{name}", value)


def pieces(moments: Tensor) -> list[Tensor]:
    """The blocks without what fills them up."""
    widths = [part.stop - part.start for part in spans(WIDTH)]
    return [own[:width, :width] for own, width in zip(moments, widths, strict=True)]


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Rows, moments in blocks, and the same as one block-diagonal matrix."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator)
    inputs = torch.randn(200, WIDTH, generator=generator) @ mix
    moments = products(inputs) / 200
    return torch.randn(12, WIDTH, generator=generator), moments, torch.block_diag(*pieces(moments))


def of(rows: Tensor, moments: Tensor) -> Weight:
    target = Target(layer="Linear", channels=len(rows), per_channel=rows.shape[1], dtype=torch.float32, macs=1.0)
    return Weight(rows, target, moments, 200)


def test_blocks_are_alike_and_cover_all_columns() -> None:
    for width in (33, 40, WIDTH, 100):
        parts = spans(width)
        assert [own.start for own in parts] == [place * block_size(width) for place in range(len(parts))]
        assert parts[-1].stop == width
        assert block_size(width) % 8 == 0
        assert block_size(width) <= SIZE
    assert spans(32) == [slice(0, 32)]


def test_products_with_blocks_are_those_with_the_whole_matrix() -> None:
    rows, moments, whole = drawn()
    torch.testing.assert_close(times(rows, moments), rows @ whole)
    near, far = of(rows, moments), of(rows, whole)
    assert near.relative_error(0.9 * rows) == pytest.approx(far.relative_error(0.9 * rows), rel=1e-5)


@pytest.mark.parametrize("ratio", [2, 5])
def test_whitened_factors_are_the_closest_by_the_block_diagonal_matrix(ratio: int) -> None:
    rows, moments, whole = drawn()
    transform = LowRank(ranks=(ratio,), whitened=True)
    by_blocks, by_whole = (transform.approximate(of(rows, own)) for own in (moments, whole))
    torch.testing.assert_close(by_blocks, by_whole, rtol=1e-4, atol=1e-5)


def test_codes_in_groups_are_those_of_every_block_alone() -> None:
    rows, moments, _ = drawn()
    transform = GroupWise(bits=3, group_size=8, compensated=True)
    found = transform.approximate(of(rows, moments))
    for own, part in zip(pieces(moments), spans(WIDTH), strict=True):
        alone = transform.approximate(of(rows[:, part].contiguous(), own))
        assert torch.equal(found[:, part], alone)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_with_one_scale_lose_less_than_to_nearest_and_nearly_as_little_as_by_the_whole(
    bits: int, sparsity: float
) -> None:
    rows, moments, whole = drawn()
    transform = PruneQuantize(bits=bits, sparsity=sparsity, compensated=True)
    metric = torch.block_diag(*(shrunk(own, 200) for own in pieces(moments)))

    def lost(approximation: Tensor) -> Tensor:
        change = (rows - approximation).double()
        return ((change @ metric) * change).sum(1)

    found = transform.approximate(of(rows, moments))
    nearest, one = transform.nearest.approximate(of(rows, moments)), transform.approximate(of(rows, whole))
    # rows are rounded to float32 when they are stored
    assert bool((lost(found) <= lost(nearest) * (1 + 1e-5)).all())
    assert float(lost(found).sum()) < float(lost(nearest).sum())
    assert float(lost(found).sum()) < 1.25 * float(lost(one).sum())
    assert torch.equal((found == 0) & (nearest == 0), nearest == 0) or sparsity == 0
    stored = transform.encode(of(rows, moments))
    assert torch.equal(transform.decode(stored, of(rows, moments).target), found)


def test_blocks_that_never_see_anything_are_rounded_to_nearest() -> None:
    rows, moments, _ = drawn()
    moments = moments.clone()
    moments[1] = 0
    for transform in (PruneQuantize(bits=3, compensated=True), GroupWise(bits=3, group_size=8, compensated=True)):
        found, nearest = transform.approximate(of(rows, moments)), transform.nearest.approximate(of(rows, moments))
        scale = found[:, SIZE : 2 * SIZE].abs().amax(1) / nearest[:, SIZE : 2 * SIZE].abs().amax(1)
        torch.testing.assert_close(found[:, SIZE : 2 * SIZE], nearest[:, SIZE : 2 * SIZE] * scale[:, None])


@pytest.mark.parametrize(
    "options",
    [
        prune_quantize(bits=(3,), sparsity=(0,), compensated=True),
        low_rank(ratios=(0.5,), whitened=True).then(prune_quantize(bits=(6,), sparsity=(0,), compensated=True)),
    ],
)
def test_a_wide_layer_is_measured_and_compressed_with_blocks(options: Options) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    data = [torch.randn(96, WIDTH) @ torch.randn(WIDTH, WIDTH)]
    measurement = measure(model, data, options, loss="mse", method="direct", only="0")
    solution = solve(formulate(measurement, {"bytes": float(measurement.original["bytes"]) * 0.6}), seed=0)
    smaller = apply(model, measurement, solution)
    assert measurement.moments["0"].ndim == 3
    assert mean_loss(model, smaller, data, loss="mse") == pytest.approx(solution.objective, rel=1e-3)
