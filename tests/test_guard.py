"""The guard takes what truly loses least on the samples kept aside, whatever the prediction says."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from formulations import FileFormatError, Problem
from qcompress import Measurement, apply, formulate, mean_loss, measure, prune_quantize, solve
from qcompress.compressed.apply import NEAREST
from qcompress.compressed.record import record_of
from qcompress.guard import Guarded, guard, kept_loss
from qcompress.proposals import Proposal, proposals, rounded_to_nearest, uniform_settings
from solvers import Solution, judge
from tests.models import Residual, seeded

BITS = prune_quantize(bits=(2, 3, 4), sparsity=(0,))
COMPENSATED = prune_quantize(bits=(2, 3, 4), sparsity=(0,), compensated=True)


def batches(first: int, count: int = 2) -> list[Tensor]:
    generators = (torch.Generator().manual_seed(seed) for seed in range(first, first + count))
    return [torch.randn(16, 2, 5, 5, generator=generator) for generator in generators]


@cache
def measured(*, compensated: bool = False) -> Measurement:
    return measure(seeded(Residual), batches(0), COMPENSATED if compensated else BITS)


def asked(measurement: Measurement, share: float = 0.35) -> tuple[Problem, Solution]:
    problem = formulate(measurement, {"bytes": share})
    return problem, solve(problem, "brute-force")


def test_the_best_has_the_least_true_loss_of_all_and_every_candidate_is_within_the_budget() -> None:
    measurement = measured()
    problem, solution = asked(measurement)
    lost = kept_loss(seeded(Residual), measurement, batches(10))
    found = guard(measurement, problem, proposals(measurement, problem, solution), lost)
    assert found.won.loss_validation == min(own.loss_validation for own in found.candidates)
    assert found.won.loss_validation == lost(found.best)
    assert all(own.usage["bytes"] <= problem.budgets["bytes"] for own in found.candidates)
    assert len({own.name for own in found.candidates}) == len(found.candidates)
    judged = problem.evaluate(found.best.choice)
    assert found.won.loss_predicted == judged.objective


def test_a_prediction_that_is_wrong_does_not_win() -> None:
    measurement = measured()
    wrong = replace(measurement, cost=measurement.cost.max() - measurement.cost)
    problem, solution = asked(wrong, 0.9)
    lost = kept_loss(seeded(Residual), wrong, batches(10))
    found = guard(wrong, problem, proposals(wrong, problem, solution), lost)
    named = {own.name: own for own in found.candidates}
    assert found.best.name.startswith("uniform")
    assert found.won.loss_validation < 0.5 * named["pair terms at 0.5"].loss_validation
    assert found.won.loss_predicted > named["pair terms at 0.5"].loss_predicted


def test_of_equals_the_solvers_own_choice_comes_first() -> None:
    measurement = measured()
    problem, solution = asked(measurement)
    found = guard(measurement, problem, proposals(measurement, problem, solution), lambda _: 1.0)
    assert found.best.name == "pair terms at 0.5"
    np.testing.assert_array_equal(found.best.choice, solution.choice)


def test_the_loss_of_a_proposal_is_that_of_the_compressed_model() -> None:
    model, measurement = seeded(Residual), measured()
    problem, solution = asked(measurement)
    lost = kept_loss(model, measurement, batches(10))
    for proposal in proposals(measurement, problem, solution):
        smaller = apply(model, measurement, judge(problem, proposal.choice))
        assert lost(proposal) == pytest.approx(mean_loss(model, smaller, batches(10)), rel=1e-5)


def test_batch_norm_statistics_are_those_of_the_compressed_model() -> None:
    model, measurement = seeded(Residual), measured()
    problem, solution = asked(measurement)
    lost = kept_loss(model, measurement, batches(10), batch_norm_data=batches(20))
    for proposal in list(proposals(measurement, problem, solution))[:3]:
        smaller = apply(model, measurement, judge(problem, proposal.choice), batch_norm_data=batches(20))
        assert lost(proposal) == pytest.approx(mean_loss(model, smaller, batches(10)), rel=1e-5)


def test_rounding_to_nearest_is_tried_where_codes_are_compensated_and_is_what_it_says() -> None:
    model, measurement = seeded(Residual), measured(compensated=True)
    _, solution = asked(measurement)
    assert solution.choice is not None
    (proposal, *_) = rounded_to_nearest(measurement, Proposal(name="it", choice=solution.choice))
    smaller = apply(model, measurement, replace(solution, details={NEAREST: list(proposal.nearest)}))
    record = record_of(smaller)
    assert record is not None
    assert all(own.transform == own.transform.nearest for own in record.parts)
    assert proposal.name == "it, to nearest"
    assert kept_loss(model, measurement, batches(10))(proposal) == pytest.approx(
        mean_loss(model, smaller, batches(10)), rel=1e-5
    )
    assert not list(rounded_to_nearest(measured(), Proposal(name="it", choice=solution.choice)))


def test_parts_that_saw_few_inputs_are_rounded_to_nearest_on_their_own() -> None:
    measurement = measured(compensated=True)
    few = measurement.parts[0].modules[0]
    measurement = replace(measurement, num_inputs={**measurement.num_inputs, few: 3})  # type: ignore[arg-type]
    choice = np.array([1] * len(measurement.parts))
    names = {own.name: own.nearest for own in rounded_to_nearest(measurement, Proposal(name="it", choice=choice))}
    assert names["it, to nearest where inputs are few"] == (0,)


def test_uniform_settings_are_the_largest_that_fits_and_the_one_of_least_predicted_loss() -> None:
    measurement = measured()
    problem = formulate(measurement, {"bytes": 1.0})
    at = {bits: problem.evaluate([bits - 1] * len(measurement.parts)).usage["bytes"] for bits in (3, 4)}
    problem = problem.with_budgets(bytes=(at[3] + at[4]) / 2)
    found = {own.name: own.choice for own in uniform_settings(measurement, problem)}
    assert list(found) == ["uniform: 3 bits", "uniform: equal shares of bytes"]
    wrong = replace(measurement, cost=-measurement.cost)
    again = [
        own.name for own in uniform_settings(wrong, formulate(wrong, {"bytes": 1.0}).with_budgets(**problem.budgets))
    ]
    assert again == ["uniform: 2 bits", "uniform: 3 bits", "uniform: equal shares of bytes"]
    for part, option in enumerate(found["uniform: 3 bits"][:-1]):
        assert measurement.transforms[part][option].label == "3 bits"


def test_without_pair_terms_no_choice_is_made_with_them() -> None:
    measurement = measured()
    problem = formulate(measurement, {"bytes": 0.35}, pairs=False)
    solution = solve(problem, "brute-force")
    names = [own.name for own in proposals(measurement, problem, solution, pairs=False)]
    assert names[0] == "additive"
    assert not any("pair terms" in name for name in names)


def test_the_solvers_pool_is_tried() -> None:
    measurement = measured()
    problem, solution = asked(measurement)
    pool = tuple((tuple([option] * len(measurement.parts)), 1.0) for option in (1, 2, 1))
    found = [own for own in proposals(measurement, problem, replace(solution, pool=pool)) if "pool" in own.name]
    assert [own.name for own in found] == ["number 2 of the solver's pool", "number 3 of the solver's pool"]
    np.testing.assert_array_equal(found[0].choice, pool[1][0])


def test_what_is_over_budget_is_left_out_and_what_breaks_the_model_loses() -> None:
    measurement = measured()
    problem, solution = asked(measurement)
    assert solution.choice is not None
    keep = Proposal(name="keep", choice=np.zeros_like(solution.choice))
    fits = Proposal(name="fits", choice=solution.choice)
    found = guard(measurement, problem, [keep, fits], lambda _: 1.0)
    assert [own.name for own in found.candidates] == ["fits"]

    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) / (self.layer.weight == self.original).all()

    model = seeded(Overflowing)
    model.original = model.layer.weight.detach().clone()  # type: ignore[union-attr]
    breaking = measure(model, [torch.randn(8, 4)], BITS, method="fisher", loss="mse")
    assert kept_loss(model, breaking, [torch.randn(8, 4)], loss="mse")(
        Proposal(name="2 bits", choice=np.array([1]))
    ) == float("inf")


def test_what_was_found_comes_back_from_its_file(tmp_path: Path) -> None:
    measurement = measured(compensated=True)
    problem, solution = asked(measurement)
    lost = kept_loss(seeded(Residual), measurement, batches(10))
    found = guard(measurement, problem, proposals(measurement, problem, solution), lost)
    found.save(tmp_path / "guard.json")
    loaded = Guarded.load(tmp_path / "guard.json")
    assert loaded.candidates == found.candidates
    assert (loaded.best.name, loaded.best.nearest) == (found.best.name, found.best.nearest)
    np.testing.assert_array_equal(loaded.best.choice, found.best.choice)
    (tmp_path / "guard.json").write_text('{"kind": "qcompress guard", "version": 1, "best": {}}')
    with pytest.raises(FileFormatError, match="no whole qcompress guard file"):
        Guarded.load(tmp_path / "guard.json")
