"""Whatever network a seed draws: what `compress` says of it is so, and what is saved is what is loaded."""

import random
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from formulations import InfeasibleBudgetError
from qcompress import Result, compress, load_compressed, low_rank, mean_loss, prune_quantize, save_compressed
from qcompress.errors import ModelError
from qcompress.options import Options
from tests.odd_networks import odd_network

FEW, MANY = 8, 2000
OFFERED = (
    prune_quantize(bits=(2, 4, 8), sparsity=(0,)),
    prune_quantize(bits=(3, 8), sparsity=(0, 0.5), compensated=True),
    low_rank(ranks=(2, 4)) + prune_quantize(bits=(4, 8), sparsity=(0,)),
)
"""By turns."""


def outputs(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    """Outputs for all batches, with the same random numbers for every model."""
    torch.manual_seed(0)
    random.seed(0)
    with torch.no_grad():
        return [model(batch) for batch in data]


def check(seed: int, folder: Path) -> None:
    odd, options = odd_network(seed), OFFERED[seed % len(OFFERED)]
    granularity = ("layer", 2, 4)[seed // 3 % 3] if isinstance(options, Options) and seed % 3 < 2 else "layer"
    before = {name: value.clone() for name, value in odd.model.state_dict().items()}
    what = f"seed {seed}, {odd.blocks}, {odd.loss}, {options}, {granularity}"

    def compressed(budget: float) -> Result:
        return compress(
            odd.model, odd.data, budget={"bytes": budget}, options=options, loss=odd.loss, granularity=granularity,
            solver="greedy", time_limit=2,
        )  # fmt: skip

    try:
        result = compressed(0.6)
    except InfeasibleBudgetError as error:  # layers that no batch reaches stay as they are
        if "no calibration input" not in str(error):
            pytest.fail(f"{what}: {error}")
        result = compressed(error.problem.minimum_usage()["bytes"])
    except ModelError as error:  # a layer that divides by the norm of a row, and an option that makes the row zero
        named = re.search(r"the loss with 'blocks\.\d\.one.*' at '.*' is not finite", str(error))
        if named is None or "own" not in odd.blocks:
            pytest.fail(f"{what}: {error}")
        return
    report = result.report
    assert report.usage["bytes"] <= report.budgets["bytes"], what
    measured = mean_loss(odd_network(seed).model, result.model, odd.data, loss=odd.loss)
    assert report.loss_measured == pytest.approx(measured, rel=1e-3, abs=1e-9), what
    saved = save_compressed(result.model, folder / f"{seed}.safetensors")
    assert saved.payload_bytes == report.usage["bytes"], what
    assert saved.path.stat().st_size == saved.file_bytes, what
    loaded = load_compressed(saved.path, lambda: odd_network(seed).model)
    state, expected = loaded.state_dict(), result.model.state_dict()
    assert state.keys() == expected.keys(), what
    assert all(torch.equal(state[name], expected[name]) for name in expected), what
    for found, wanted in zip(outputs(loaded, odd.data), outputs(result.model, odd.data), strict=True):
        assert torch.equal(found, wanted), what
    after = odd.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), what
    assert any(candidate.name == report.chosen for candidate in report.candidates) or not report.candidates, what


@pytest.mark.parametrize("seed", [*range(FEW), 1456, 1693])
def test_what_compress_says_of_odd_networks_is_so(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, MANY, 100))
def test_what_compress_says_of_many_odd_networks_is_so(start: int, tmp_path: Path) -> None:
    for seed in range(start, start + 100):
        check(seed, tmp_path)
