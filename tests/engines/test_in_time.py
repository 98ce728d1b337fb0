"""Budgets for seconds in an engine: conversions between neighbours are counted, and choices are timed whole."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import qcompress
from benchmarks.traces import traced_once
from formulations import InfeasibleBudgetError, Problem
from qcompress.budgets import LATENCY
from qcompress.engines import onnx_clock, onnx_tracing
from qcompress.engines.in_time import TOLERANCE, solved_in_time, with_reachable_time
from qcompress.engines.legal import for_engine
from qcompress.engines.onnx_conversions import INTEGER, Link, halves, links, pair_terms
from qcompress.engines.onnxruntime import OnnxRuntime
from qcompress.measuring.latency import load_times, save_times, with_times
from solvers import solve
from tests.measurements import measured

ENGINE = OnnxRuntime(threads=1)


class Residual(nn.Module):
    """A stem, two blocks of two convolutions with shortcuts, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c, self.d = (nn.Conv2d(inputs, 4, 3, padding=1) for inputs in (3, 4, 4, 4, 4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = torch.relu(x + self.d(torch.relu(self.c(x))))
        return self.fc(x.mean((2, 3)))


def test_neighbours_are_linked_through_what_is_between_them() -> None:
    model = Residual().eval()
    proto = onnx_tracing.trace(model, torch.randn(2, 3, 6, 6))
    names = dict(enumerate(f"model.{name}.weight" for name in ("stem", "a", "b", "c", "d", "fc")))
    found = links(proto, names, dict.fromkeys(names, 100.0))
    assert {(link.producer, link.consumer): link.size for link in found} == {
        (0, 1): 100, (1, 2): 100, (2, 3): 100, (3, 4): 100, (4, 5): 100,
    }  # fmt: skip


def test_a_conversion_counts_where_one_of_two_neighbours_is_in_integers() -> None:
    kinds = [[(), INTEGER], [(), ("bits", 4), INTEGER], [()]]
    found = [Link(producer=0, consumer=1, size=10.0), Link(producer=1, consumer=2, size=3.0)]
    terms = pair_terms(found, 0.5, kinds)
    problem = Problem(["a", "b", "c"], [["0", "1"], ["0", "1", "2"], ["0"]], np.zeros(6), {LATENCY: np.zeros(6)}, {},
                      resource_pairs={LATENCY: terms})  # fmt: skip
    for choice in itertools.product(range(2), range(3), range(1)):
        integers = {place for place, option in enumerate(choice) if kinds[place][option] == INTEGER}
        expected = sum(0.5 * link.size for link in found if link.is_mixed(integers))
        assert problem.evaluate(choice).usage[LATENCY] == expected
    assert halves([0, 3, 5]) == ({0, 5}, {3})


@pytest.mark.slow
def test_conversions_are_kept_with_the_times(tmp_path) -> None:
    torch.manual_seed(0)
    model, batch = Residual().eval(), torch.randn(2, 3, 24, 24)
    legal = for_engine(ENGINE, model, measured(model, batch, qcompress.integer_products()), batch)
    timed = ENGINE.time_options(model, legal, batch)
    save_times(timed, tmp_path / "times.npz")
    again = load_times(legal, tmp_path / "times.npz")
    for choice in itertools.product(*(range(len(own)) for own in timed.transforms)):
        first, second = (qcompress.formulate(own, {LATENCY: 1.0}).evaluate(choice).usage for own in (timed, again))
        assert first == second
    seconds = ENGINE.seconds_of(model, timed, [[0] * 6, [len(own) - 1 for own in timed.transforms]], batch)
    assert all(0 < own < 100 * timed.original[LATENCY] for own in seconds)


def test_whole_choices_with_factors_are_timed() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval(), torch.randn(4, 64)
    options = qcompress.low_rank(ratios=(0.5,), whitened=False).then(qcompress.prune_quantize(bits=(4,), group_size=16))
    legal = for_engine(ENGINE, model, measured(model, batch, options), batch)
    timed = ENGINE.time_options(model, legal, batch)
    assert len(ENGINE.seconds_of(model, timed, [[1, 0], [1, 1]], batch)) == 2


class Sized(int):
    """A graph of a size, which takes as long."""

    def ByteSize(self) -> int:  # noqa: N802 (a name of protobuf)
        return int(self)


def test_whole_models_take_turns_with_the_original_as_far_as_they_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    turns: list[list[int]] = []

    def in_turn(sessions: Sequence[int], *_: object, **__: object) -> list[float]:
        turns.append(list(sessions))
        return [float(session) for session in sessions]

    monkeypatch.setattr(onnx_clock, "in_turn", in_turn)
    monkeypatch.setattr(onnx_clock, "MOST_BYTES", 100)
    clock = onnx_clock.Clock(ENGINE, tmp_path)
    monkeypatch.setattr(clock, "_session", lambda proto: proto)
    ratios = clock.ratios(Sized(50), map(Sized, (20, 30, 10, 90, 25, 25, 5)), None)
    assert ratios == [0.4, 0.6, 0.2, 1.8, 0.5, 0.5, 0.1]
    assert turns == [[50, 20, 30], [50, 10], [50, 90], [50, 25, 25], [50, 5]]
    assert clock.ratios(Sized(50), [], None) == []


class ByHand(nn.Module):
    """Inputs by name, a parameter used by hand, and a layer with two inputs, none of which an option makes faster."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.both = nn.Linear(20, 20), nn.Bilinear(20, 20, 4)
        self.weight = nn.Parameter(torch.randn(20, 20))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.both(torch.relu(self.first(left)) @ self.weight, right)


def test_only_layers_with_faster_options_are_timed_on_their_own() -> None:
    torch.manual_seed(0)
    model, batch = ByHand().eval(), {"left": torch.randn(4, 20), "right": torch.randn(4, 20)}
    options = qcompress.prune_quantize(bits=(4,), group_size=(16, 20))
    legal = for_engine(ENGINE, model, measured(model, batch, options), batch)
    timed = ENGINE.time_options(model, legal, batch)
    starts = np.cumsum([0, *map(len, timed.transforms)])
    changed = [np.ptp(timed.resources[LATENCY][a:b]) > 0 for a, b in itertools.pairwise(starts)]
    assert {part.name for part, own in zip(timed.parts, changed, strict=True) if own} <= {"first"}
    assert len(timed.parts) == 3


def by_time(problem: Problem, true_use: NDArray[np.float64]):
    """A clock by which options take ``true_use``."""

    def seconds(choices: Sequence[NDArray[np.int64]]) -> list[float]:
        return [float(true_use[problem.flat(choice)].sum()) for choice in choices]

    return seconds


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_that_takes_longer_than_predicted_is_made_anew_until_it_is_in_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = np.sort(rng.random((6, 4)), axis=1)
    use = np.sort(rng.random((6, 4)), axis=1)[:, ::-1]
    problem = Problem(list("abcdef"), [["0", "1", "2", "3"]] * 6, cost.ravel(), {LATENCY: use.ravel()},
                      {LATENCY: 0.6 * float(use[:, 0].sum())})  # fmt: skip
    true_use = use.ravel() * rng.uniform(1.0, 1.3, 24)
    first = solve(problem, "dp")
    seconds = by_time(problem, true_use)
    stated, found = solved_in_time(problem, problem, first, seconds, lambda own: solve(own, "dp"))
    limit = (1 + TOLERANCE) * problem.budgets[LATENCY]
    assert problem.evaluate(found.choice).feasible
    assert seconds([found.choice])[0] <= max(limit, seconds([first.choice])[0])
    assert found.bound == first.bound
    assert found.objective >= first.objective
    if seconds([first.choice])[0] <= limit:
        assert found is first
        assert stated is problem
    else:
        assert seconds([found.choice])[0] < seconds([first.choice])[0]


@pytest.fixture(scope="module")
def traces() -> Iterator[None]:
    """Networks of one structure are traced once."""
    with traced_once():
        yield


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, traces: None) -> list[list[list[int]]]:
    """A clock by which a layer in integers saves half of its time, said to save three quarters; the calls to it."""
    calls: list[list[list[int]]] = []

    def seconds_of(self: object, model: object, measurement: object, choices: list[list[int]], batch: object):
        calls.append(choices)
        return [measurement.original[LATENCY] * time_of(choice) for choice in choices]

    def time_options(self: object, model: object, measurement, batch: object, on_progress: object = None):
        starts = np.cumsum([0, *map(len, measurement.transforms[:-1])])
        use = np.full(len(measurement.cost), 0.25)
        use[starts] = 1.0
        return with_times(measurement, use, 0.0, 3.0)

    monkeypatch.setattr(OnnxRuntime, "seconds_of", seconds_of)
    monkeypatch.setattr(OnnxRuntime, "time_options", time_options)
    return calls


def time_of(choice: Sequence[int]) -> float:
    """Share of the original's time of a choice for three layers."""
    return 0.5 + 0.5 * sum(option == 0 for option in choice) / 3


def in_integers(budget: float) -> list[int]:
    """The choice for a share of the time of three layers, each in integers or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    result = qcompress.compress(
        model, [torch.randn(64, 48)], budget={LATENCY: budget}, options=qcompress.integer_products(), target=ENGINE,
        solver="dp", pairs=False, loss="mse",
    )  # fmt: skip
    return result.solution.choice.tolist()


def test_compress_takes_no_choice_that_is_seen_to_take_longer_than_the_budget(told: list[list[list[int]]]) -> None:
    assert time_of(in_integers(0.7)) <= 0.7 * (1 + TOLERANCE)
    assert len(told[-1]) > 1  # the guard's candidates are timed together


def test_a_mixture_that_does_not_stand_out_gives_way_to_a_uniform_setting(
    told: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 in in_integers(0.9)
    monkeypatch.setattr("qcompress.guard.Advantage.is_clear", property(lambda self: False))
    assert 0 not in in_integers(0.9)


def test_a_uniform_setting_counts_by_its_measured_time_whatever_is_predicted(
    monkeypatch: pytest.MonkeyPatch, traces: None
) -> None:
    """Static integers take half the time, said to take four fifths; dynamic ones nine tenths, said to take three."""
    said, true = np.array([1.0, 0.8, 0.3]), np.array([1.0, 0.5, 0.9])

    def time_options(self: object, model: object, measurement, batch: object, on_progress: object = None):
        return with_times(measurement, np.tile(said, 3), 0.0, 3.0)

    def seconds_of(self: object, model: object, measurement: object, choices: list[list[int]], batch: object):
        return [float(true[choice].sum()) for choice in choices]

    monkeypatch.setattr(OnnxRuntime, "time_options", time_options)
    monkeypatch.setattr(OnnxRuntime, "seconds_of", seconds_of)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 8)).eval()

    def asked_for(budget: float) -> qcompress.Result:
        return qcompress.compress(
            model, [torch.randn(64, 48)], budget={LATENCY: budget}, options=qcompress.integer_products(),
            target=ENGINE, solver="dp", pairs=False, loss="mse",
        )  # fmt: skip

    result = asked_for(0.6)
    assert result.solution.choice.tolist() == [1, 1, 1]
    assert result.report.usage[LATENCY] > result.report.budgets[LATENCY]
    assert (result.report.bound, result.report.gap) == (None, None)  # they hold for choices in the predicted time
    assert "made by measured times" in result.report.to_markdown()
    said[2] = 2.0  # now no choice keeps the budget by prediction
    result = asked_for(0.6)
    assert result.solution.choice.tolist() == [1, 1, 1]
    assert (result.report.bound, str(result.solution.status)) == (None, "FEASIBLE")
    with pytest.raises(InfeasibleBudgetError, match="asked for at most 1200 ms; the fastest takes 2400 ms by predic"):
        asked_for(0.4)


@pytest.mark.parametrize("seed", range(10))
def test_a_budget_that_no_choice_keeps_by_prediction_is_the_shortest_predicted_time(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds = [[(), INTEGER]] * 5
    neighbours = [Link(producer=place, consumer=place + 1, size=rng.random()) for place in range(4)]
    use, terms = rng.random(10), pair_terms(neighbours, 0.5, kinds)
    problem = Problem(list("abcde"), [["0", "1"]] * 5, rng.random(10), {LATENCY: use, "bytes": rng.random(10)},
                      {LATENCY: 0.1, "bytes": 4.0}, resource_pairs={LATENCY: terms})  # fmt: skip
    within = [
        choice for choice in itertools.product(range(2), repeat=5) if "bytes" not in problem.evaluate(choice).violations
    ]
    least = min(problem.evaluate(choice).usage[LATENCY] for choice in within)
    in_half = with_reachable_time(problem, lambda choices: [0.1] * len(choices), lambda own: solve(own, "brute-force"))
    assert in_half.budgets[LATENCY] == pytest.approx(least, rel=1e-12)
    with pytest.raises(InfeasibleBudgetError, match="timed as a whole"):
        with_reachable_time(problem, lambda choices: [0.2] * len(choices), lambda own: solve(own, "brute-force"))
    alike = np.array(max(within, key=lambda choice: problem.evaluate(choice).usage[LATENCY]))  # fast as a whole only
    slow_sum = problem.evaluate(alike).usage[LATENCY]
    reached = with_reachable_time(
        problem,
        lambda choices: [0.1 if np.array_equal(choice, alike) else 0.2 for choice in choices],
        lambda own: solve(own, "brute-force"),
        [alike],
    )
    assert reached.budgets[LATENCY] == pytest.approx(slow_sum, rel=1e-12)
    possible = problem.with_budgets(**{LATENCY: least})
    assert with_reachable_time(possible, lambda _: [], lambda own: solve(own, "brute-force")) is possible
