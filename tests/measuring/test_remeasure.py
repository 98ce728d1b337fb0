"""Measured again around a choice: exact where it can be, never worse in true loss, and any choice emulated."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from formulations import FileFormatError, Problem
from qcompress import (
    Measurement,
    TrueLoss,
    apply,
    compress,
    formulate,
    low_rank,
    mean_loss,
    measure,
    prune_quantize,
    refine,
    remeasure,
    solve,
)
from qcompress.errors import DataError, ModelError, OptionsError
from qcompress.measuring.progress import MeasureProgress
from qcompress.model.losses import KullbackLeibler, Loss, MeanSquaredError
from solvers import Solution, judge
from tests.measurements import KINDS
from tests.models import Residual, seeded

BITS = prune_quantize(bits=(2, 3, 4), sparsity=(0,))
ALL = BITS + low_rank(ratios=(0.5,), kinds=("channels", "spatial"), whitened=True).then(BITS)


def batches(count: int = 2) -> list[Tensor]:
    return [torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def squared(output: Tensor, batch: Tensor) -> Tensor:
    return (output - batch.mean()).square().mean(1)


@pytest.fixture(scope="module")
def measurement() -> Measurement:
    return measure(seeded(Residual), batches(), BITS, method="direct")


def predicted(measurement: Measurement, choice: list[int]) -> float:
    """The loss of a choice with all of the pair terms."""
    offsets = np.cumsum([0, *(len(own) for own in measurement.transforms[:-1])])
    chosen = offsets + choice
    effect = measurement.factor[chosen]
    pairs = 0.5 * (np.square(effect.sum(0)).sum() - np.square(effect).sum())
    return float(measurement.standing_loss + measurement.cost[chosen].sum() + pairs)


# ---- what is measured ----


@pytest.mark.parametrize("method", ["fisher", "direct"])
def test_where_the_loss_is_quadratic_every_choice_is_predicted_exactly_from_any_choice(method: str) -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(5, 6), [torch.randn(32, 5)]
    first = measure(model, data, BITS, method=method, loss="mse", granularity=2)
    true_loss = TrueLoss(model, first, data, loss="mse")
    for standing in ([0, 0, 0], [1, 2, 3], [1, 1, 1]):
        again = remeasure(model, data, first, standing)
        assert again.standing == tuple(standing)
        assert again.standing_loss == pytest.approx(true_loss(standing), rel=1e-6)
        for choice in itertools.product(range(4), repeat=3):
            # float32 effects; the loss is a difference of numbers as large as the standing loss
            expected = true_loss(list(choice))
            assert predicted(again, list(choice)) == pytest.approx(expected, rel=1e-4, abs=1e-5 * again.standing_loss)


def test_by_trying_every_single_change_is_exact(measurement: Measurement) -> None:
    model, data = seeded(Residual), batches()
    true_loss = TrueLoss(model, measurement, data)
    standing = [1, 0, 2, 1]
    again = remeasure(model, data, measurement, standing)
    flat = 0
    for part, options in enumerate(again.transforms):
        for option in range(len(options)):
            choice = [option if i == part else own for i, own in enumerate(standing)]
            assert again.standing_loss + again.cost[flat] == pytest.approx(true_loss(choice), rel=1e-5)
            flat += 1


def test_with_many_outputs_the_slope_counts() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 40)), [torch.randn(512, 6)]
    first = measure(model, data, BITS)
    exact = measure(model, data, BITS, method="direct")
    near, true = (remeasure(model, data, own, [1, 1]) for own in (first, exact))
    assert true.cost.min() < -0.1 * true.standing_loss  # going back from 2 bits pays, which only a slope can say
    # linearised, and the curvature by 8 probes a sample
    np.testing.assert_allclose(near.cost, true.cost, atol=0.25 * np.abs(true.cost).max())


@pytest.mark.parametrize("loss", [KullbackLeibler(), MeanSquaredError()])
def test_gradients_are_those_of_the_rise(loss: Loss) -> None:
    torch.manual_seed(0)
    reference, point = torch.randn(3, 4, 5), torch.randn(3, 4, 5, requires_grad=True)
    loss.rise(point, reference, None).sum().backward()
    found = loss.gradient(point.detach(), None, reference)
    assert found is not None
    torch.testing.assert_close(found, point.grad)
    assert loss.gradient(reference, None) is None


def test_the_original_is_left_as_it_is_and_the_file_keeps_where_it_stood(
    measurement: Measurement, tmp_path: Path
) -> None:
    model = seeded(Residual).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = remeasure(model, batches(), measurement, [1, 0, 2, 1])
    assert model.training
    assert all(own.requires_grad for own in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again.save(tmp_path / "again.npz")
    loaded = Measurement.load(tmp_path / "again.npz")
    assert (
        (loaded.standing, loaded.standing_loss)
        == (again.standing, again.standing_loss)
        == ((1, 0, 2, 1), again.standing_loss)
    )
    problem = formulate(loaded, {"bytes": 0.9}, changes=1)
    assert problem.evaluate([1, 0, 2, 1]).objective == pytest.approx(again.standing_loss, rel=1e-12)
    for choice in itertools.product(range(4), repeat=4):
        changes = sum(own != there for own, there in zip(choice, again.standing, strict=True))
        assert problem.evaluate(choice).usage["changes"] == changes


def test_a_cut_run_goes_on_and_another_one_is_refused(
    measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.measuring.accumulation.SAVE_EVERY_S", 0.0)
    model, data, cache = seeded(Residual), batches(3), tmp_path / "again.part"

    def cut(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remeasure(model, data, measurement, [1, 1, 1, 1], cache=cache, on_progress=cut)
    with pytest.raises(DataError, match="another measurement"):
        remeasure(model, data, measurement, [2, 1, 1, 1], cache=cache)
    seen: list[int] = []
    again = remeasure(
        model, data, measurement, [1, 1, 1, 1], cache=cache, on_progress=lambda own: seen.append(own.batches)
    )
    assert seen == [2, 3]
    np.testing.assert_array_equal(again.cost, remeasure(model, data, measurement, [1, 1, 1, 1]).cost)


# ---- choices emulated ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_true_loss_of_a_choice_is_that_of_the_compressed_model(kind: str) -> None:
    torch.manual_seed(0)
    make_model, make_batch = KINDS[kind]
    model, data = make_model().eval(), [make_batch(), make_batch()]
    found = measure(model, data, ALL, loss="mse", method="direct")
    true_loss = TrueLoss(model, found, data, loss="mse")
    rng = np.random.default_rng(0)
    for _ in range(8):
        choice = np.array([rng.integers(len(own)) for own in found.transforms])
        problem = formulate(found, {"bytes": 1.0}).with_budgets(bytes=1e9)
        small = apply(model, found, judge(problem, choice))
        # factors multiply in another order, in float32
        assert true_loss(choice) == pytest.approx(mean_loss(model, small, data, loss="mse"), rel=1e-3, abs=1e-9)


# ---- chosen again ----


def test_every_round_is_within_the_budget_and_truly_better(measurement: Measurement) -> None:
    model, data = seeded(Residual), batches()
    problem = formulate(measurement, {"bytes": 0.3})
    worst = max(
        (list(own) for own in itertools.product(range(4), repeat=4) if problem.evaluate(own).feasible),
        key=TrueLoss(model, measurement, data),
    )
    rounds = []
    refined = refine(model, data, measurement, problem, worst, rounds=4, on_round=rounds.append)
    assert refined.steps == tuple(rounds)
    losses = [refined.loss_before, *(own.loss for own in refined.steps)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    solution = judge(problem, refined.choice)
    assert solution.feasible
    found = mean_loss(model, apply(model, measurement, solution), data)
    assert refined.loss == losses[-1] == pytest.approx(found, rel=1e-6)
    best = min(
        (list(own) for own in itertools.product(range(4), repeat=4) if problem.evaluate(own).feasible),
        key=TrueLoss(model, measurement, data),
    )
    assert refined.loss <= 1.05 * TrueLoss(model, measurement, data)(best)  # from the worst choice to about the best


def test_a_refinement_that_was_cut_goes_on_and_another_one_is_refused(measurement: Measurement, tmp_path: Path) -> None:
    model, data, cache = seeded(Residual), batches(), tmp_path / "refined.json"
    wrong = replace(measurement, cost=-measurement.cost, factor=np.zeros_like(measurement.factor))
    problem = formulate(wrong, {"bytes": 0.5})
    start = solve(problem, "brute-force").choice
    assert start is not None
    whole = refine(model, data, wrong, problem, start, rounds=4)
    assert len(whole.steps) > 1

    def cut(step: object) -> None:
        raise KeyboardInterrupt

    first = refine(model, data, wrong, problem, start, rounds=1, cache=cache)
    assert first.steps == whole.steps[:1]
    with pytest.raises(KeyboardInterrupt):
        refine(model, data, wrong, problem, start, rounds=4, cache=cache, on_progress=cut)
    measured: list[object] = []
    again = refine(model, data, wrong, problem, start, rounds=4, cache=cache, on_progress=measured.append)
    assert (again.choice.tolist(), again.steps, again.complete) == (whole.choice.tolist(), whole.steps, whole.complete)
    measured.clear()
    assert refine(model, data, wrong, problem, start, rounds=4, cache=cache, on_progress=measured.append).steps
    assert not measured
    with pytest.raises(OptionsError, match="holds another refinement"):
        refine(model, data, wrong, problem.with_budgets(bytes=1e6), start, cache=cache)
    assert [own.name for own in tmp_path.iterdir()] == ["refined.json"]


def test_compress_with_rounds_gives_the_refined_choice_and_says_so(tmp_path: Path) -> None:
    model, data = seeded(Residual), batches()
    result = compress(
        model,
        data,
        budget={"bytes": 0.25},
        options=BITS,
        refine_rounds=3,
        time_limit=5,
        guard=False,
        folder=tmp_path / "run",
    )
    plain = compress(model, data, budget={"bytes": 0.25}, options=BITS, time_limit=5, guard=False)
    refined = result.report.refined
    assert refined is not None
    assert refined["loss_before"] == pytest.approx(plain.report.loss_measured, rel=1e-6)
    assert result.report.loss_measured == pytest.approx(refined["loss"], rel=1e-6)
    assert result.report.loss_measured <= plain.report.loss_measured  # how much better depends on the weights drawn
    assert result.solution.bound == plain.solution.bound
    assert result.report.usage["bytes"] <= result.report.budgets["bytes"]
    assert mean_loss(model, result.model, data) == pytest.approx(refined["loss"], rel=1e-6)
    assert "measured again around the choice" in result.report.to_markdown()
    again = compress(
        model,
        data,
        budget={"bytes": 0.25},
        options=BITS,
        refine_rounds=3,
        time_limit=5,
        guard=False,
        folder=tmp_path / "run",
    )
    assert again.report.refined == refined
    without = compress(
        model, data, budget={"bytes": 0.25}, options=BITS, time_limit=5, guard=False, folder=tmp_path / "run"
    )
    assert without.report.refined is None
    assert without.report.loss_measured == plain.report.loss_measured


def test_without_pair_terms_the_rounds_have_none_either(
    measurement: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []

    def spy(problem: Problem, **settings: object) -> Solution:
        solved.append(bool(problem.pairs))
        return solve(problem, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules["qcompress.refinement"], "solve", spy)
    model, data = seeded(Residual), batches()
    for pairs in (False, True):
        problem = formulate(measurement, {"bytes": 0.3}, pairs=pairs)
        refine(model, data, measurement, problem, solve(problem).choice, rounds=1)  # type: ignore[arg-type]
        assert set(solved) == {pairs}
        solved.clear()


def test_rounds_that_save_what_they_measured_do_not_meet_each_others_sums(
    measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.measuring.accumulation.SAVE_EVERY_S", -1.0)
    model, data, cache = seeded(Residual), batches(), tmp_path / "refined.json"
    wrong = replace(measurement, cost=-measurement.cost, factor=np.zeros_like(measurement.factor))
    problem = formulate(wrong, {"bytes": 0.5})
    start = solve(problem, "brute-force").choice
    assert start is not None
    whole, told = refine(model, data, wrong, problem, start, rounds=4), [0]

    def cut(progress: MeasureProgress) -> None:
        told[0] += 1
        if told[0] == len(data) + 1:  # in the second round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(model, data, wrong, problem, start, rounds=4, cache=cache, on_progress=cut)
    again = refine(model, data, wrong, problem, start, rounds=4, cache=cache)
    assert (again.choice.tolist(), again.steps, again.complete) == (whole.choice.tolist(), whole.steps, whole.complete)
    assert [own.name for own in tmp_path.iterdir()] == ["refined.json"]


def test_what_a_round_brought_is_kept_when_the_run_is_cut_on_hearing_of_it(
    measurement: Measurement, tmp_path: Path
) -> None:
    model, data, cache = seeded(Residual), batches(), tmp_path / "refined.json"
    wrong = replace(measurement, cost=-measurement.cost, factor=np.zeros_like(measurement.factor))
    problem = formulate(wrong, {"bytes": 0.5})
    start = solve(problem, "brute-force").choice
    assert start is not None

    def cut(step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(model, data, wrong, problem, start, cache=cache, on_round=cut)
    measured: list[object] = []
    assert (
        len(refine(model, data, wrong, problem, start, rounds=1, cache=cache, on_progress=measured.append).steps) == 1
    )
    assert not measured
    value = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: own for key, own in value.items() if key != "steps"}))
    with pytest.raises(FileFormatError, match="is not a complete qcompress refinement file"):
        refine(model, data, wrong, problem, start, cache=cache)


def test_a_wrong_prediction_is_put_right() -> None:
    model, data = seeded(Residual), batches()
    found = measure(model, data, BITS, method="direct")
    wrong = replace(found, cost=-found.cost, factor=np.zeros_like(found.factor))
    problem = formulate(wrong, {"bytes": 0.5})
    start = solve(problem, "brute-force").choice
    refined = refine(model, data, wrong, problem, start, rounds=3)
    assert refined.steps
    assert refined.loss < 0.5 * refined.loss_before


def test_a_callable_loss_has_to_be_given_again() -> None:
    model, data = seeded(Residual), batches()
    found = measure(model, data, BITS, loss=squared)
    problem = formulate(found, {"bytes": 0.4})
    choice = solve(problem, "brute-force").choice
    assert choice is not None
    refined = refine(model, data, found, problem, choice, loss=squared, rounds=1)
    assert refined.loss <= refined.loss_before
    with pytest.raises(OptionsError, match="'squared': pass that callable as loss="):
        refine(model, data, found, problem, choice)
    with pytest.raises(OptionsError, match="made with the loss 'squared', found 'kl'"):
        remeasure(model, data, found, choice, loss="kl")


def test_bad_input_is_refused(measurement: Measurement) -> None:
    model, data = seeded(Residual), batches()
    problem = formulate(measurement, {"bytes": 0.4})
    with pytest.raises(OptionsError, match="rounds must be a whole number from 1, found 0"):
        refine(model, data, measurement, problem, [0] * 4, rounds=0)
    with pytest.raises(ModelError, match="chooses for 2 groups, the measurement has 4 parts"):
        remeasure(model, data, measurement, [0, 0])
    with pytest.raises(ModelError, match="chooses option 9"):
        remeasure(model, data, measurement, [9, 0, 0, 0])
    with pytest.raises(ModelError, match="not the model that was measured"):
        remeasure(seeded(Residual, seed=1), data, measurement, [0, 0, 0, 0])
    with pytest.raises(DataError, match="calibration data is empty"):
        TrueLoss(model, measurement, [])
