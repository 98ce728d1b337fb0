"""`compress` keeps samples aside before anything is fitted, takes what loses least there, and says what it saw."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import (
    Measurement,
    Solution,
    apply,
    compress,
    formulate,
    load_compressed,
    low_rank,
    mean_loss,
    measure,
    prune_quantize,
)
from qcompress.cautions import FACTOR, MARGIN, of_inputs, of_limit, of_prediction
from qcompress.compressed.record import record_of
from qcompress.errors import DataError
from qcompress.guard import Candidate
from qcompress.model.samples import split_samples
from qcompress.report import Report
from solvers import solve
from tests.models import Residual, seeded

BITS = prune_quantize(bits=(2, 3, 4), sparsity=(0,))
STRENGTHS = {"additive": False, "pair terms at 0.25": 0.25, "pair terms at 0.5": 0.5, "pair terms at 1": 1.0}
QUICK: dict[str, Any] = {"budget": {"bytes": 0.35}, "options": BITS, "time_limit": 2}


def batches(first: int = 0, count: int = 2) -> list[Tensor]:
    generators = (torch.Generator().manual_seed(seed) for seed in range(first, first + count))
    return [torch.randn(16, 2, 5, 5, generator=generator) for generator in generators]


def error_of_mean(model: nn.Module, changed: nn.Module, data: Iterable[Tensor]) -> float:
    """Standard error of the mean KL, from the loss of every sample by itself."""
    losses = [mean_loss(model, changed, [sample[None]]) for batch in data for sample in batch]
    return float(np.std(losses, ddof=1) / len(losses) ** 0.5)


def test_nothing_is_measured_on_the_samples_kept_aside_and_the_report_is_of_them() -> None:
    model, data = seeded(Residual), batches()
    result = compress(model, data, **QUICK)
    split = split_samples(model, data)
    assert result.measurement.num_samples == 24
    expected = measure(model, split.calibration, BITS)
    np.testing.assert_array_equal(result.measurement.cost, expected.cost)
    report = result.report
    assert report.loss_validation == pytest.approx(mean_loss(model, result.model, split.kept), rel=1e-6)
    assert report.loss_validation_error == pytest.approx(error_of_mean(model, result.model, split.kept), rel=1e-5)
    assert f"{report.loss_validation:.6g} ± {report.loss_validation_error:.2g}" in report.to_markdown()
    assert report.loss_measured == pytest.approx(mean_loss(model, result.model, data), rel=1e-6)
    losses = {own.name: own.loss_validation for own in report.candidates}
    assert not report.refitted
    assert losses[report.chosen] == min(losses.values()) == pytest.approx(report.loss_validation, rel=1e-5)
    tried = "; ".join([*losses, *(own.name for own in report.undecided)])  # equal ones stand once, under all names
    assert "additive" in tried.split("; ")
    assert "uniform: equal shares of bytes" in tried.split("; ")
    assert report.wall_s["guard"] > 0


def test_batches_given_for_validation_leave_all_the_data_to_measure_on() -> None:
    model, data, other = seeded(Residual), batches(), batches(10)
    report = compress(model, data, **QUICK, validation=other).report
    result = compress(model, data, **QUICK, validation=other)
    assert result.measurement.num_samples == 32
    assert report.loss_validation == pytest.approx(mean_loss(model, result.model, other), rel=1e-6)
    with pytest.raises(DataError, match="empty"):
        compress(model, data, **QUICK, validation=[])


def test_without_the_guard_the_solvers_choice_is_taken() -> None:
    model, data = seeded(Residual), batches()
    result = compress(model, data, **QUICK, guard=False)
    assert result.measurement.num_samples == 32
    assert (result.report.candidates, result.report.chosen, result.report.loss_validation) == ((), None, None)
    assert result.report.warnings == ()
    seen = compress(model, data, **QUICK, guard=False, validation=batches(10))
    assert seen.report.candidates == ()
    assert seen.report.loss_validation == pytest.approx(mean_loss(model, seen.model, batches(10)), rel=1e-6)


class Misled(nn.Module):
    """Two layers, of which the second has an effect on one sample in sixteen only; no batch that is measured has it."""

    def __init__(self) -> None:
        super().__init__()
        self.seldom, self.often = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.often(x) + self.seldom(x) * (x[:, :1] > 0)


def test_a_choice_that_fails_on_other_samples_is_not_taken_and_the_report_warns() -> None:
    model = seeded(Misled)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, 8, generator=generator)
    data[:, 0] = -data[:, 0].abs()
    other = torch.randn(64, 8, generator=generator)
    settings: dict[str, Any] = {"options": prune_quantize(bits=(2, 8), sparsity=(0,)), "loss": "mse", "time_limit": 2}
    settings["budget"] = {"bytes": 0.37}  # one layer at 8 bits, the other at 2
    guarded, bare = (compress(model, [data], validation=[other], guard=own, **settings) for own in (True, False))
    assert guarded.report.loss_validation <= bare.report.loss_validation
    (warning,) = bare.report.warnings
    assert "is more than the predicted one" in warning
    assert "refine_rounds" in warning
    markdown = bare.report.to_markdown()
    assert markdown.index("**WARNING:**") < markdown.index("| resource |")
    assert bare.report.to_json()["warnings"] == (warning,)


def test_the_report_says_of_what_the_proof_is_and_lists_what_was_tried(tmp_path: Path) -> None:
    result = compress(seeded(Residual), batches(), **QUICK, solver="brute-force", guard=False)
    assert "OPTIMAL by brute-force: proven optimal for the predicted loss" in result.report.to_markdown()
    guarded = compress(seeded(Residual), batches(), **QUICK).report
    assert f"| {guarded.chosen} |" in guarded.to_markdown()
    assert guarded.to_markdown().count("| taken |") == 1
    optimum, worse = (Candidate(name, loss, 0.1, {}) for name, loss in (("optimum", 1.0), ("worse", 1.5)))
    for tried, proven in (((optimum, worse), True), ((worse,), False)):
        report = replace(guarded, status="FEASIBLE", bound=1.0, gap=1 / 3, candidates=tried, chosen="worse")
        assert ("the choice that is proven optimal" in report.to_markdown()) == proven
        assert ("not proven optimal" in report.to_markdown()) != proven
    guarded.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == guarded
    assert json.loads(json.dumps(guarded.to_json()))["candidates"][0].keys() == {
        "name",
        "loss_predicted",
        "loss_validation",
        "usage",
    }


def test_data_that_cannot_be_split_is_told() -> None:
    few = compress(seeded(Residual), [batches()[0][:3]], **QUICK).report
    assert few.candidates == ()
    assert few.loss_validation is few.loss_validation_error is None
    assert "no samples were held out: 3 samples are too few" in few.warnings[0]
    model, data = seeded(Residual), batches()
    measurement = measure(model, data, BITS)
    given = {name: value for name, value in QUICK.items() if name != "options"}
    assert any(
        "may have used" in own for own in compress(model, data, **given, measurement=measurement).report.warnings
    )


def test_what_is_fitted_to_fewer_inputs_than_a_layer_has_is_told_with_the_number_that_would_do() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4)))
    options = prune_quantize(bits=(3, 4), sparsity=(0,), compensated=True)
    result = compress(model, [torch.randn(40, 48)], budget={"bytes": 0.2}, options=options, time_limit=2, guard=False)
    (warning,) = result.report.warnings
    assert "1 of 2 parts were fitted to fewer calibration inputs than the dimension of their input" in warning
    assert "('0': 40 for 48)" in warning
    assert "48 samples like these would be enough (now 40)" in warning
    enough = compress(model, [torch.randn(48, 48)], budget={"bytes": 0.2}, options=options, guard=False, time_limit=2)
    assert not list(of_inputs(enough.measurement, enough.solution))


@pytest.mark.parametrize(
    ("predicted", "seen", "told"),
    [
        (0.1, 0.1 * FACTOR, False),
        (0.1, 0.11 * FACTOR, True),
        (0.1, 0.09 / FACTOR, True),
        (-0.02, 1.2, True),
        (0.0, 0.0, False),
        (1e-5, 1e-4, False),
        (1e-5, 5e-4, True),  # of small losses, only factors above FAR
        (1e-9, 1e-7, False),
    ],
)
def test_losses_that_differ_by_more_than_the_factor_are_told(predicted: float, seen: float, told: bool) -> None:
    assert bool(list(of_prediction("kl", predicted, seen, ""))) == told


@pytest.mark.parametrize(
    ("predicted", "seen", "words"),
    [
        (-0.0245, -0.2497, "-0.2497, is less than the predicted one, -0.0245 (a factor of 10.2): the proof"),
        (-0.2497, -0.0245, "-0.0245, is more than the predicted one, -0.2497 (a factor of 10.2): the proof"),
        (0.3, 0.1, "0.1, is less than the predicted one, 0.3 (a factor of 3): the proof"),
        (-0.1, 0.1, "0.1, is more than the predicted one, -0.1: the proof"),
        (-0.24, -0.25, ""),
    ],
)
def test_losses_that_fall_are_compared_by_their_size(predicted: float, seen: float, words: str) -> None:
    told = " ".join(of_prediction("mine", predicted, seen, "patience"))
    assert (words in told) if words else not told


@pytest.mark.parametrize(("scale", "told"), [(1.0, False), (200.0, True)])
def test_a_network_that_is_sure_of_all_held_out_samples_is_told(scale: float, told: bool) -> None:
    model = seeded(Residual)

    def forward(network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = scale * network(batch)
        return output

    with torch.no_grad():
        sure = [batch[forward(model, batch).softmax(-1).amax(-1) > 0.999] if told else batch for batch in batches()]
    options: dict[str, Any] = {"options": BITS, "time_limit": 2, "solver": "milp", "pairs": False}
    warnings = compress(model, sure, budget={"bytes": 0.3}, forward=forward, **options).report.warnings
    assert any("sure of all its answers" in warning for warning in warnings) == told


@pytest.mark.parametrize(
    ("limit", "seen", "told"),
    [(None, 1.0, False), (1e-6, 0.9e-6, False), (1e-6, MARGIN * 1e-6, False), (1e-6, 1.2e-6, True), (0.1, 0.2, True)],
)
def test_a_measured_loss_above_the_limit_is_told_however_small(limit: float | None, seen: float, told: bool) -> None:
    assert bool(list(of_limit(limit, seen, ""))) == told


def test_the_smallest_model_for_a_loss_that_loses_more_on_other_samples_says_so() -> None:
    given: dict[str, Any] = {"minimize": "bytes", "options": BITS, "time_limit": 2, "solver": "milp", "pairs": False}
    model, data, limit = seeded(Residual), batches(), 1e-4
    near = compress(model, data, budget={"loss": limit}, validation=data, **given).report
    assert near.loss_validation is not None
    assert near.loss_validation <= MARGIN * limit
    far = compress(model, data, budget={"loss": limit}, validation=[30 * batch for batch in batches(5)], **given).report
    assert far.loss_validation is not None
    assert far.loss_validation > MARGIN * limit
    said = [[warning for warning in report.warnings if "times the limit" in warning] for report in (near, far)]
    assert [len(warnings) for warnings in said] == [0, 1]
    assert f"{far.loss_validation:.6g}, is {far.loss_validation / limit:.3g} times the limit of 0.0001" in said[1][0]


def test_a_run_that_is_cut_goes_on_with_the_guards_choice_and_its_files_are_of_that_choice(tmp_path: Path) -> None:
    model, data = seeded(Residual), batches()

    def cut(evaluated: nn.Module) -> float:
        if evaluated is not model:
            raise KeyboardInterrupt
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        compress(model, data, **QUICK, folder=tmp_path, evaluate=cut)
    written = (tmp_path / "guard.json").stat().st_mtime_ns
    result = compress(model, data, **QUICK, folder=tmp_path)
    assert (tmp_path / "guard.json").stat().st_mtime_ns == written
    solution = Solution.load(tmp_path / "solution.json")
    np.testing.assert_array_equal(solution.choice, result.solution.choice)
    applied = apply(model, result.measurement, solution)
    loaded = load_compressed(tmp_path / "model.safetensors", lambda: seeded(Residual, seed=5))
    for name, tensor in applied.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


COMPENSATED: dict[str, Any] = {
    "budget": {"bytes": 0.35},
    "options": prune_quantize(bits=(2, 3, 4), sparsity=(0,), compensated=True),
    "time_limit": 2,
}
WHITENED: dict[str, Any] = {
    "budget": {"macs": 0.6},
    "options": low_rank(ratios=(0.25, 0.5), whitened=True),
    "time_limit": 2,
}


def few_inputs() -> tuple[nn.Module, list[Tensor]]:
    """A model whose layers see about as many samples as a sample has numbers, so that each of them counts."""
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12)))
    generator = torch.Generator().manual_seed(3)
    return model, [torch.randn(20, 12, generator=generator) * torch.linspace(0.1, 2, 12) for _ in range(2)]


def same_weights(left: nn.Module, right: nn.Module) -> bool:
    found = right.state_dict()
    return all(torch.equal(tensor, found[name]) for name, tensor in left.state_dict().items())


@pytest.mark.parametrize("settings", [COMPENSATED, WHITENED])
def test_after_the_choice_codes_and_factors_are_fitted_to_all_the_data(settings: dict[str, Any]) -> None:
    model, data = few_inputs()
    result = compress(model, data, **settings)
    assert not result.solution.details.get("nearest")
    whole = measure(model, data, settings["options"])
    for path, moments in whole.moments.items():
        np.testing.assert_array_equal(result.measurement.moments[path], moments)
    assert result.measurement.num_inputs == whole.num_inputs == {"0": 40, "2": 40}
    assert same_weights(result.model, apply(model, result.measurement, result.solution))
    assert same_weights(result.model, apply(model, whole, result.solution))

    split = split_samples(model, data)
    earlier = measure(model, split.calibration, settings["options"])
    np.testing.assert_array_equal(result.measurement.cost, earlier.cost)
    before, report = apply(model, earlier, result.solution), result.report
    assert not same_weights(result.model, before)
    assert report.refitted
    assert report.loss_validation == pytest.approx(mean_loss(model, before, split.kept), rel=1e-5)
    assert report.loss_validation_error == pytest.approx(error_of_mean(model, before, split.kept), rel=1e-4)
    assert report.loss_validation != pytest.approx(mean_loss(model, result.model, split.kept), rel=1e-3)
    assert report.loss_measured == pytest.approx(mean_loss(model, result.model, data), rel=1e-6)
    assert report.usage == result.solution.usage
    assert report.usage["bytes"] == record_bytes(before) == record_bytes(result.model)
    assert "(before the final choice and fit, which use them too)" in report.to_markdown()


def unsure_of_samples() -> tuple[nn.Module, list[Tensor]]:
    """Layers that count about the same, and few samples: which of them is to lose bits depends on the draw."""
    model = seeded(lambda: nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6))))
    generator = torch.Generator().manual_seed(0)
    return model, [torch.randn(12, 8, generator=generator)]


TIGHT: dict[str, Any] = {**QUICK, "budget": {"bytes": 0.29}}


def test_the_way_that_won_is_repeated_on_all_the_data() -> None:
    model, data = unsure_of_samples()
    result = compress(model, data, **TIGHT)
    report, split = result.report, split_samples(model, data)
    whole = measure(model, data, BITS)
    partly = replace(whole, cost=0.75 * whole.cost + 0.25 * whole.softened)
    standard = "partly softened outputs, pair terms at 0.25"
    ways = {
        **{name: formulate(whole, result.problem.budgets, pairs=strength) for name, strength in STRENGTHS.items()},
        "softened outputs": formulate(replace(whole, cost=whole.softened), result.problem.budgets, pairs=False),
        "partly softened outputs": formulate(partly, result.problem.budgets, pairs=False),
        standard: formulate(partly, result.problem.budgets, pairs=0.25),
    }
    names = report.chosen.split("; ")
    name = next(own for own in (standard, *names) if own in names)
    best = solve(ways[name], "brute-force")
    assert ways[name].evaluate(result.solution.choice).objective == pytest.approx(best.objective, rel=1e-5)
    assert report.parts_moved
    assert report.refitted
    assert f"{report.parts_moved} parts changed" in report.to_markdown()
    won = compress(model, split.calibration, **TIGHT, validation=split.kept)
    assert (won.solution.choice != result.solution.choice).sum() == report.parts_moved
    assert won.report.parts_moved == 0
    assert won.report.loss_validation == pytest.approx(report.loss_validation, rel=1e-5)
    assert won.report.loss_validation == pytest.approx(mean_loss(model, won.model, split.kept), rel=1e-5)


def test_a_run_that_is_cut_while_it_chooses_again_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = unsure_of_samples()
    whole = compress(model, data, **TIGHT)

    def cut(*_: object, **__: object) -> float:
        raise KeyboardInterrupt

    for place in ("with_more_samples", "repeated"):
        with monkeypatch.context() as patch:
            patch.setattr(f"qcompress.steps.repeating.{place}", cut)
            with pytest.raises(KeyboardInterrupt):
                compress(model, data, **TIGHT, folder=tmp_path)
        assert not (tmp_path / "repeated.json").exists()
    resumed = compress(model, data, **TIGHT, folder=tmp_path)
    assert replace(resumed.report, wall_s={}) == replace(whole.report, wall_s={})
    assert same_weights(whole.model, resumed.model)
    monkeypatch.setattr("qcompress.steps.repeating.with_more_samples", cut)
    assert same_weights(compress(model, data, **TIGHT, folder=tmp_path).model, whole.model)


def record_bytes(model: nn.Module) -> int:
    record = record_of(model)
    assert record is not None
    return record.payload_bytes


@pytest.mark.parametrize(
    "settings",
    [
        QUICK,
        {**COMPENSATED, "guard": False},
        {**COMPENSATED, "validation": batches(10)},
        {**COMPENSATED, "finetune_steps": 1},
    ],
    ids=["nothing fitted", "no guard", "validation given", "fine-tuned"],
)
def test_nothing_is_fitted_anew_where_no_samples_were_kept_aside_for_the_choice_alone(settings: dict[str, Any]) -> None:
    report = compress(seeded(Residual), batches(), **settings).report
    assert not report.refitted
    assert "refit" not in report.wall_s
    assert "before codes" not in report.to_markdown()


def test_a_measurement_that_is_given_keeps_its_moments() -> None:
    model, data = few_inputs()
    given = measure(model, [torch.cat(data), data[0] + 1], COMPENSATED["options"])
    settings = {name: value for name, value in COMPENSATED.items() if name != "options"}
    result = compress(model, data, **settings, measurement=given)
    assert result.measurement.num_inputs == given.num_inputs
    assert not result.report.refitted


def test_a_run_that_is_cut_while_or_after_it_is_fitted_anew_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = few_inputs()
    whole = compress(model, data, **COMPENSATED)
    passes: list[object] = []

    def cut(*given: object, **_: object) -> float:
        passes.append(given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qcompress.measuring.refit.second_moments", cut)
        with pytest.raises(KeyboardInterrupt):
            compress(model, data, **COMPENSATED, folder=tmp_path)
    assert not (tmp_path / "refitted.npz").exists()
    with pytest.raises(KeyboardInterrupt):
        compress(
            model, data, **COMPENSATED, folder=tmp_path, evaluate=lambda smaller: 0.5 if smaller is model else cut()
        )
    assert len(passes) == 2
    monkeypatch.setattr("qcompress.measuring.refit.second_moments", cut)
    resumed = compress(model, data, **COMPENSATED, folder=tmp_path)
    assert len(passes) == 2
    assert replace(resumed.report, wall_s={}) == replace(whole.report, wall_s={})
    saved = Measurement.load(tmp_path / "refitted.npz")
    loaded = load_compressed(tmp_path / "model.safetensors", lambda: few_inputs()[0])
    for smaller in (
        resumed.model,
        loaded,
        apply(model, resumed.measurement, resumed.solution),
        apply(model, saved, Solution.load(tmp_path / "solution.json")),
    ):
        assert same_weights(whole.model, smaller)


def test_another_budget_in_the_same_folder_is_fitted_to_the_same_moments(tmp_path: Path) -> None:
    model, data = few_inputs()
    compress(model, data, **COMPENSATED, folder=tmp_path)
    written = (tmp_path / "refitted.npz").stat().st_mtime_ns
    tighter = {**COMPENSATED, "budget": {"bytes": 0.3}}
    again = compress(model, data, **tighter, folder=tmp_path)
    assert (tmp_path / "refitted.npz").stat().st_mtime_ns == written
    assert same_weights(again.model, compress(model, data, **tighter).model)
