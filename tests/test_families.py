"""Families of options in the benchmarks: each as if it were alone, the joint choice never worse than any of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qcompress
from benchmarks.families import FAMILIES, Apart, kept, restricted, solve_families, subproblem
from benchmarks.tables import Rows
from qcompress import low_rank, prune_quantize
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from solvers import Solution

RANKS = low_rank(ratios=(0.25, 0.5), kinds=("channels",), whitened=False)
OFFERED = (
    prune_quantize(bits=(3, 4, 8), sparsity=(0,))
    + prune_quantize(bits=(4,), sparsity=(0.5,))
    + RANKS
    + RANKS.then(prune_quantize(bits=(4, 8), sparsity=(0, 0.5)))
)


def network() -> nn.Sequential:
    """Half of the first layer's weights are next to nothing: there 4 bits of half beat 3 bits of all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[:, ::2] *= 1e-3
    return model


@pytest.fixture(scope="module")
def measurement() -> qcompress.Measurement:
    torch.manual_seed(1)
    return qcompress.measure(network(), [torch.randn(64, 24)], Apart(OFFERED.offers))


def test_a_family_keeps_what_another_one_would_take_from_it(measurement: qcompress.Measurement) -> None:
    alone = qcompress.measure(network(), [torch.randn(4, 24)], OFFERED)
    assert PruneQuantize(bits=3) not in alone.transforms[0]
    assert PruneQuantize(bits=3) in measurement.transforms[0]


def test_a_subproblem_values_its_choices_as_the_whole_does(measurement: qcompress.Measurement) -> None:
    problem = qcompress.formulate(measurement, {"bytes": 0.3})
    rng = np.random.default_rng(0)
    for family in FAMILIES.values():
        keep = kept(problem, measurement, family)
        small = subproblem(problem, keep)
        local = np.array([rng.integers(len(own)) for own in keep])
        whole = problem.evaluate(np.array([own[i] for own, i in zip(keep, local, strict=True)]))
        assert small.evaluate(local).objective == pytest.approx(whole.objective, rel=1e-12)
        assert small.evaluate(local).usage == whole.usage


def test_joint_is_never_worse_and_a_cut_run_goes_on(measurement: qcompress.Measurement, tmp_path: Path) -> None:
    problem = qcompress.formulate(measurement, {"bytes": 0.45})
    judged: list[Solution] = []

    def worth(solution: Solution) -> dict[str, float]:
        judged.append(solution)
        if len(judged) == 3:
            raise KeyboardInterrupt
        return {"worth": float(len(judged))}

    def run(settings: int) -> dict[str, Solution]:
        rows = Rows(tmp_path / "rows.json", {"settings": settings})
        return solve_families(rows, {"at": 1}, problem, measurement, worth, time_limit=2)

    with pytest.raises(KeyboardInterrupt):
        run(0)
    found = run(0)
    assert list(found) == list(FAMILIES)
    assert found["joint"].objective <= min(own.objective for own in found.values())
    assert len(judged) == len(FAMILIES) + 1  # only the row that was cut is done again
    again = run(0)
    assert len(judged) == len(FAMILIES) + 1
    assert [own.choice.tolist() for own in again.values()] == [own.choice.tolist() for own in found.values()]
    run(1)
    assert len(judged) == 2 * len(FAMILIES) + 1  # other settings begin anew


def test_a_family_that_cannot_meet_the_budget_has_a_row_that_says_so(
    measurement: qcompress.Measurement, tmp_path: Path
) -> None:
    problem = qcompress.formulate(measurement, {"bytes": 0.2})
    rows = Rows(tmp_path / "rows.json", {})
    found = solve_families(rows, {}, problem, measurement, lambda _: {}, time_limit=2)
    missing = [row["choice"] for row in rows.of() if "bytes" not in row]
    assert "rank" in missing
    assert set(found) == set(FAMILIES) - set(missing)


def test_a_restricted_measurement_makes_the_subproblem(measurement: qcompress.Measurement) -> None:
    problem = qcompress.formulate(measurement, {"bytes": 0.3})
    for family in FAMILIES.values():
        keep = kept(problem, measurement, family)
        expected = subproblem(problem, keep)
        found = qcompress.formulate(restricted(measurement, keep), {"bytes": 0.3})
        assert found.fingerprint() == expected.fingerprint()
