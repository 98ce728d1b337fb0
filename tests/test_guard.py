"""The guard takes what truly loses least on the held-out samples, whatever the prediction says."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from formulations import FileFormatError, Problem
from qcompress import Measurement, apply, formulate, mean_loss, measure, prune_quantize, solve
from qcompress.compressed.apply import NEAREST
from qcompress.compressed.record import record_of
from qcompress.errors import ModelError
from qcompress.formulation import at_softened_outputs
from qcompress.guard import PRIOR, Advantage, Guarded, HeldOutLosses, KeptLoss, guard
from qcompress.measuring.true_loss import TrueLoss
from qcompress.model.losses import SOFTENED
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
    lost = KeptLoss(seeded(Residual), measurement, batches(10))
    found = guard(measurement, problem, proposals(measurement, problem, solution), lost)
    assert found.won.loss_validation == min(own.loss_validation for own in found.candidates)
    assert found.won.loss_validation == lost(found.best).mean
    everything = (*found.candidates, *found.undecided)
    assert all(own.usage["bytes"] <= problem.budgets["bytes"] for own in everything)
    assert len({own.name for own in everything}) == len(everything)
    judged = problem.evaluate(found.best.choice)
    assert found.won.loss_predicted == judged.objective


def test_a_prediction_that_is_wrong_does_not_win() -> None:
    measurement = measured()
    wrong = replace(measurement, cost=measurement.cost.max() - measurement.cost, softened=None)
    problem, solution = asked(wrong, 0.9)
    lost = KeptLoss(seeded(Residual), wrong, batches(10))
    found = guard(wrong, problem, proposals(wrong, problem, solution), lost)
    named = {name: own for own in found.candidates for name in own.name.split("; ")}
    assert found.best.name.startswith("uniform")
    assert found.won.loss_validation < 0.5 * named["pair terms at 0.5"].loss_validation
    assert found.won.loss_predicted > named["pair terms at 0.5"].loss_predicted


def test_of_equals_the_solvers_own_choice_comes_first() -> None:
    measurement = measured()
    problem, solution = asked(measurement)
    found = guard(
        measurement,
        problem,
        proposals(measurement, problem, solution),
        lambda _: HeldOutLosses.of(np.ones(4)),
    )
    assert found.best.name.startswith("pair terms at 0.5")
    np.testing.assert_array_equal(found.best.choice, solution.choice)


def test_the_loss_of_a_proposal_is_that_of_the_compressed_model() -> None:
    model, measurement = seeded(Residual), measured()
    problem, solution = asked(measurement)
    lost = KeptLoss(model, measurement, batches(10))
    for proposal in proposals(measurement, problem, solution):
        smaller = apply(model, measurement, judge(problem, proposal.choice))
        assert lost(proposal).mean == pytest.approx(mean_loss(model, smaller, batches(10)), rel=1e-5)


def test_batch_norm_statistics_are_those_of_the_compressed_model() -> None:
    model, measurement = seeded(Residual), measured()
    problem, solution = asked(measurement)
    lost = KeptLoss(model, measurement, batches(10), batch_norm_data=batches(20))
    for proposal in list(proposals(measurement, problem, solution))[:3]:
        smaller = apply(model, measurement, judge(problem, proposal.choice), batch_norm_data=batches(20))
        assert lost(proposal).mean == pytest.approx(mean_loss(model, smaller, batches(10)), rel=1e-5)


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
    assert KeptLoss(model, measurement, batches(10))(proposal).mean == pytest.approx(
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


def test_what_is_over_budget_is_left_out() -> None:
    measurement = measured()
    problem, solution = asked(measurement)
    assert solution.choice is not None
    keep = Proposal(name="keep", choice=np.zeros_like(solution.choice))
    fits = Proposal(name="fits", choice=solution.choice)
    found = guard(measurement, problem, [keep, fits], lambda _: HeldOutLosses.of(np.ones(4)))
    assert [own.name for own in found.candidates] == ["fits"]


def test_a_choice_that_breaks_the_model_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    measurement = measured()
    problem, solution = asked(measurement)
    assert solution.choice is not None
    broken, whole = Proposal(name="broken", choice=solution.choice), Proposal(name="whole", choice=solution.choice * 0)
    by_sample = TrueLoss.by_sample

    def overflowing(self: TrueLoss, choice: np.ndarray) -> np.ndarray:
        if choice.any():
            raise ModelError("the model's output holds NaN or infinity")
        return by_sample(self, choice)

    monkeypatch.setattr(TrueLoss, "by_sample", overflowing)
    seen = KeptLoss(seeded(Residual), measurement, batches(10))
    found = guard(measurement, problem.with_budgets(bytes=1e9), [broken, whole], seen)
    assert found.best.name == "whole"
    assert {own.name: own.loss_validation for own in found.candidates} == {"broken": float("inf"), "whole": 0.0}


@pytest.mark.parametrize("timed", [False, True])
def test_without_a_finite_reference_the_least_loss_of_all_is_taken(*, timed: bool) -> None:
    measurement = measured()
    problem, solution = asked(measurement)
    figures = {"reference": np.inf, "first": 100.0, "best": 0.1, "last": 1.0}
    tried = [Proposal(name=name, choice=solution.choice, nearest=(index,)) for index, name in enumerate(figures)]
    words = {"seen_of": lambda own: HeldOutLosses.of(figures[own.name] + np.arange(4)), "base": "reference"}
    assert guard(measurement, problem, tried, timed=timed, **words).best.name == "best"
    uniform = [replace(own, name=f"uniform: {own.name}") for own in tried[1:]]
    words["seen_of"] = lambda own: HeldOutLosses.of(figures[own.name.removeprefix("uniform: ")] + np.arange(4))
    assert guard(measurement, problem, [tried[0], *uniform], timed=timed, **words).best.name == "uniform: best"


def test_what_was_found_comes_back_from_its_file(tmp_path: Path) -> None:
    measurement = measured(compensated=True)
    problem, solution = asked(measurement)
    lost = KeptLoss(seeded(Residual), measurement, batches(10))
    found = guard(measurement, problem, proposals(measurement, problem, solution), lost)
    found.save(tmp_path / "guard.json")
    loaded = Guarded.load(tmp_path / "guard.json")
    assert (loaded.candidates, loaded.undecided) == (found.candidates, found.undecided)
    assert (loaded.best.name, loaded.best.nearest) == (found.best.name, found.best.nearest)
    np.testing.assert_array_equal(loaded.best.choice, found.best.choice)
    (tmp_path / "guard.json").write_text('{"kind": "qcompress guard", "version": 1, "best": {}}')
    with pytest.raises(FileFormatError, match="not a complete qcompress guard file"):
        Guarded.load(tmp_path / "guard.json")


def test_what_is_better_by_chance_only_is_told_as_undecided_and_not_taken() -> None:
    measurement = measured()
    problem, solution = asked(measurement)
    rng = np.random.default_rng(0)
    losses = rng.lognormal(sigma=2, size=64)
    other = rng.permutation(losses)
    other *= 0.7 * losses.mean() / other.mean()
    clear = 0.8 * losses
    figures = {"additive": losses, "chance": other, "clear": clear}
    tried = [Proposal(name=name, choice=solution.choice + 0 * index) for index, name in enumerate(figures)]
    tried = [replace(own, nearest=(index,)) for index, own in enumerate(tried)]
    found = guard(measured(), problem, tried, lambda own: HeldOutLosses.of(figures[own.name]))
    assert found.best.name == "clear"
    assert [own.name for own in found.undecided] == ["chance"]
    without = guard(measured(), problem, tried[:2], lambda own: HeldOutLosses.of(figures[own.name]))
    assert without.best.name == "additive"


numbers = st.floats(min_value=-1e3, max_value=1e3, width=32)
losses_of_samples = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8)


@given(losses_of_samples, numbers, numbers)
def test_an_advantage_lies_between_what_is_seen_and_what_is_predicted(
    losses: list[tuple[float, float]], predicted: float, predicted_other: float
) -> None:
    one, other = (np.array(own, dtype=np.float64) for own in zip(*losses, strict=True))
    found = Advantage.of(HeldOutLosses.of(one), HeldOutLosses.of(other), predicted, predicted_other)
    size, expected_size = np.abs(one).mean() + np.abs(other).mean(), abs(predicted) + abs(predicted_other)
    seen = 2 * (one.mean() - other.mean()) / size if size else 0.0
    expected = 2 * (predicted - predicted_other) / expected_size if expected_size else 0.0
    assert min(seen, expected) - 1e-6 <= found.mean <= max(seen, expected) + 1e-6
    assert 0 < found.error <= PRIOR * (1 + 1e-12)
    if len(losses) == 1:  # one sample has no spread: nothing is known of its error
        assert found == pytest.approx((expected, PRIOR))
    turned = Advantage.of(HeldOutLosses.of(other), HeldOutLosses.of(one), predicted_other, predicted)
    assert turned == pytest.approx((-found.mean, found.error), abs=1e-9)


def test_many_samples_outweigh_a_prediction_and_few_do_not() -> None:
    rng = np.random.default_rng(3)
    for size, clear in ((2, False), (400, True)):
        losses = rng.lognormal(sigma=1.5, size=size)
        better = losses * rng.lognormal(mean=-0.5, sigma=0.5, size=size)
        assert Advantage.of(HeldOutLosses.of(losses), HeldOutLosses.of(better), 1.0, 2.0).is_clear is clear


def test_the_choice_without_pair_terms_and_uniform_ones_need_not_be_clearly_better() -> None:
    measurement = measured()
    problem, solution = asked(measurement)
    rng = np.random.default_rng(4)
    losses = rng.lognormal(sigma=1.5, size=12)
    other = losses[::-1] * 0.95
    figures = {"reference": losses, "additive": other, "uniform: 3 bits": 0.99 * other, "a mixture": 0.98 * other}
    tried = [Proposal(name=name, choice=solution.choice, nearest=(index,)) for index, name in enumerate(figures)]
    words = {"seen_of": lambda own: HeldOutLosses.of(figures[own.name])}
    assert not Advantage.of(HeldOutLosses.of(losses), HeldOutLosses.of(other), 1, 1).is_clear
    found = guard(measurement, problem, [tried[0], tried[1]], base="reference", **words)
    assert found.best.name == "additive"
    found = guard(measurement, problem, tried[:3], base="reference", **words)
    assert found.best.name == "uniform: 3 bits"
    found = guard(measurement, problem, [tried[0], tried[3]], base="reference", **words)
    assert found.best.name == "reference"
    assert [own.name for own in found.undecided] == ["a mixture"]
    found = guard(measurement, problem, [tried[2], tried[1]], base="uniform: 3 bits", timed=True, **words)
    assert found.best.name == "uniform: 3 bits"


def test_positions_of_a_sequence_are_one_sample() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11)), [torch.randint(0, 11, (3, 5))]
    found = measure(model, data, BITS)
    seen = KeptLoss(model, found, data)(Proposal(name="", choice=np.array([1, 1])))
    assert seen.samples.shape == (3,)
    smaller = apply(model, found, judge(formulate(found, {"bytes": 1.0}), [1, 1]))
    assert seen.mean == pytest.approx(mean_loss(model, smaller, data), rel=1e-5)


def test_equal_choices_are_listed_once_under_all_their_names() -> None:
    measurement = measured()
    problem, solution = asked(measurement)
    assert solution.choice is not None
    other = np.array([3] * len(measurement.parts))
    tried = [("a", solution.choice), ("b", other), ("c", solution.choice), ("d", other * 0)]
    losses = {"a": 2.0, "b": 1.0, "c": 2.0, "d": 3.0}
    asked_of: list[str] = []

    def seen_of(proposal: Proposal) -> HeldOutLosses:
        asked_of.append(proposal.name)
        return HeldOutLosses.of(np.full(8, losses[proposal.name]) + np.arange(8))

    found = guard(
        measurement,
        problem.with_budgets(bytes=1e9),
        [Proposal(name=name, choice=choice) for name, choice in tried],
        seen_of,
        base="c",
    )
    assert [own.name for own in found.candidates] == ["a; c", "b", "d"]
    assert found.best.name == "b"
    assert len(asked_of) == 3


def test_costs_at_softened_outputs_are_those_of_outputs_over_the_temperature() -> None:
    model, measurement = seeded(Residual), measured()
    assert measurement.softened is not None
    problem = formulate(measurement, {"bytes": 1.0})
    soft = at_softened_outputs(problem, measurement, 0.5)
    for part in range(len(measurement.parts)):
        for option in range(len(measurement.transforms[part])):
            choice = np.zeros(len(measurement.parts), dtype=int)
            choice[part] = option
            smaller = apply(model, measurement, judge(problem, choice))
            true = SOFTENED**2 * mean_loss(
                model, smaller, batches(0), forward=lambda model, batch: model(batch) / SOFTENED
            )
            at = problem.flat(choice)[part]
            # effects are linearised, so that harsh options differ by some per cent
            assert measurement.softened[at] == pytest.approx(true, rel=0.2, abs=2e-3 * measurement.softened.max())
            assert soft.evaluate(choice).objective == pytest.approx(measurement.softened[at], abs=1e-9)


def test_softened_costs_are_proposed_and_come_back_from_the_file(tmp_path: Path) -> None:
    measurement = measured()
    measurement.save(tmp_path / "measurement.npz")
    loaded = Measurement.load(tmp_path / "measurement.npz")
    assert loaded.softened is not None
    np.testing.assert_array_equal(loaded.softened, measurement.softened)
    problem, solution = asked(measurement)
    found = {own.name: own.choice for own in proposals(measurement, problem, solution)}
    best = solve(at_softened_outputs(problem, measurement, 0.0), "brute-force")
    np.testing.assert_array_equal(found["softened outputs"], best.choice)
    mean = replace(measurement, cost=0.75 * measurement.cost + 0.25 * loaded.softened)
    partly = solve(formulate(mean, dict(problem.budgets), pairs=False), "brute-force")
    np.testing.assert_array_equal(found["partly softened outputs"], partly.choice)
    careful = solve(formulate(mean, dict(problem.budgets), pairs=0.25), "brute-force")
    np.testing.assert_array_equal(found["partly softened outputs, pair terms at 0.25"], careful.choice)
    without = replace(measurement, softened=None)
    assert not any("softened" in own.name for own in proposals(without, problem, solution))
