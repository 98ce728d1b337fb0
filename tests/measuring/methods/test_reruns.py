"""Options whose estimated cost is worth least are run alone, and what that finds replaces the estimate."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

import qcompress
from qcompress.cautions import of_selections
from qcompress.formulation import prediction_error
from qcompress.measuring.methods import reruns
from qcompress.measuring.methods.reruns import options_to_run, routers, sample_places, unconfirmed, with_runs
from qcompress.measuring.progress import MeasureProgress
from qcompress.model.forward import default_forward
from tests.models import TiedLanguageModel, seeded
from tests.opened_models import in_memory, saved, tokens
from tests.quick import slow_but

OPTIONS = qcompress.prune_quantize(bits=(3, 4, 6), sparsity=(0,))
EVEN = qcompress.prune_quantize(bits=(4, 8), sparsity=(0,))
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


class Squared(nn.Module):
    """A layer whose inputs give next to no output, of which the square counts: no gradient tells what a change does."""

    def __init__(self) -> None:
        super().__init__()
        self.still, self.plain, self.head = nn.Linear(8, 6, bias=False), nn.Linear(8, 6), nn.Linear(6, 5)
        basis = torch.linalg.qr(torch.randn(8, 8)).Q
        self.still.weight.data = torch.randn(6, 2) @ basis[:2]
        self.register_buffer("seen", basis[2:])

    def forward(self, x: Tensor) -> Tensor:
        silent = x[:, 2:] @ self.get_buffer("seen") + 0.01 * x[:, :1]
        rows: Tensor = self.head(self.plain(x) + 3 * self.still(silent).square())
        return rows


def drawn(count: int, seed: int = 0) -> list[Tensor]:
    return [torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))]


def estimated(monkeypatch: pytest.MonkeyPatch, *given: Any, **more: Any) -> qcompress.Measurement:
    """The measurement without runs."""
    with monkeypatch.context() as patch:
        patch.setattr(reruns, "PASSES", 0)
        return qcompress.measure(*given, method="sampled", **more)


def flat(measurement: qcompress.Measurement, name: str, bits: int) -> int:
    names = [
        (part.name, transform.label)
        for part, options in zip(measurement.parts, measurement.transforms, strict=True)
        for transform in options
    ]
    return names.index((name, f"{bits} bits"))


def test_an_effect_that_no_gradient_sees_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = seeded(Squared), drawn(64)
    true = qcompress.measure(model, data, OPTIONS, method="direct")
    found = qcompress.measure(model, data, OPTIONS, method="sampled")
    guessed = estimated(monkeypatch, model, data, OPTIONS)
    option = flat(true, "still", 3)
    assert guessed.cost[option] < true.cost[option] / 4
    assert found.ran is not None
    assert found.ran[option]
    assert found.standard_error is not None
    assert abs(found.cost[option] - true.cost[option]) < 2 * found.standard_error[option]


def test_costs_of_options_that_were_not_run_are_the_estimates_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reruns, "PASSES", 1)
    model, data = seeded(Squared), drawn(8)
    found, guessed = (
        qcompress.measure(model, data, OPTIONS, method="sampled"),
        estimated(monkeypatch, model, data, OPTIONS),
    )
    assert found.ran is not None
    assert 0 < found.ran.sum() < 9
    assert (found.cost != guessed.cost).any()
    assert guessed.ran is None
    for name in ("cost", "standard_error"):
        assert (getattr(found, name) == getattr(guessed, name))[~found.ran].all()
    assert (found.factor == guessed.factor).all()


@pytest.mark.parametrize("count", [1, 2, 8, 40])
def test_runs_take_no_more_forward_passes_than_promised(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = 0

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal samples
        samples += len(batch)
        return default_forward(model, batch)

    model, data = seeded(Squared), drawn(count)
    estimated(monkeypatch, model, data, OPTIONS, forward=forward)
    without, samples = samples, 0
    qcompress.measure(model, data, OPTIONS, method="sampled", forward=forward)
    assert 0 < samples - without <= reruns.PASSES * count


@pytest.mark.parametrize("opened", slow_but([True], [False, True]))
def test_options_of_routers_cost_what_the_experts_that_change_cost(
    opened: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = saved("Mixtral", tmp_path, num_hidden_layers=2, **EXPERTS)
    options, data = qcompress.prune_quantize(bits=(3, 4), sparsity=(0,)), [tokens(12, 64)]
    true = qcompress.measure(in_memory(folder), data, options, method="direct")
    model = qcompress.open_model(folder) if opened else in_memory(folder)
    found, guessed = (
        qcompress.measure(model, data, options, method="sampled"),
        estimated(monkeypatch, model, data, options),
    )
    gates = [flat(true, f"model.layers.{block}.mlp.gate", bits) for block in (0, 1) for bits in (3, 4)]
    assert (guessed.cost[gates] < true.cost[gates] / 3).any()
    assert found.ran is not None
    assert found.ran[gates].all()
    assert (np.abs(np.log(found.cost[gates] / true.cost[gates])) < np.log(2)).all()
    assert list(of_selections(guessed, "")) != []
    assert unconfirmed(found) == ()
    assert list(of_selections(found, "")) == []


def test_routers_that_were_not_run_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = in_memory(saved("Mixtral", tmp_path, num_hidden_layers=2, **EXPERTS))
    monkeypatch.setattr(reruns, "PASSES", 1)
    found = qcompress.measure(
        model, [tokens(12, 8)], qcompress.prune_quantize(bits=(4,), sparsity=(0,)), method="sampled"
    )
    assert routers(found) == {f"model.layers.{block}.mlp.gate": part for block, part in ((0, 5), (1, 18))}
    assert unconfirmed(found) == ()
    assert unconfirmed(replace(found, ran=None)) == tuple(routers(found))


def small(**more: Any) -> qcompress.Measurement:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return qcompress.measure(model, drawn(16), OPTIONS, method="sampled", **more)


def measurement(cost: list[float], error: list[float]) -> qcompress.Measurement:
    factor = 10 * np.tile([0.0, 1.0], (8, 8))  # no effect was limited
    given = {"cost": np.array(cost, dtype=float), "standard_error": np.array(error, dtype=float)}
    return replace(small(), factor=factor, ran=None, **given)  # type: ignore[arg-type]


def test_the_error_of_a_run_is_never_below_its_share_over_all_runs() -> None:
    rises = np.array([[1.0, 1.2, 1.0, 1.2], [0.0, 2.0, 4.0, 2.0]])
    found = with_runs(measurement([1.0] * 8, [0.5] * 8), 16, [1, 3], rises, [1] * 4)
    assert found.ran is not None
    assert found.standard_error is not None
    assert np.flatnonzero(found.ran).tolist() == [1, 3]
    assert found.cost.tolist() == pytest.approx([1, 1.1, 1, 2, 1, 1, 1, 1])
    one, other = 0.1 / 3**0.5, 2 / 6**0.5  # of the means
    assert found.standard_error[[1, 3]].tolist() == pytest.approx([np.hypot(one, other * 1.1 / 2) / 2**0.5, other])


def test_the_error_of_samples_of_several_rows_is_that_of_a_ratio() -> None:
    rises, sizes = np.array([[1.0, 2.0, 4.0]]), np.array([32, 4, 3])
    found = with_runs(measurement([0.5] * 8, [0.5] * 8), 16, [1], rises, sizes.tolist())
    assert found.standard_error is not None
    assert found.cost[1] == pytest.approx(mean := np.average(rises[0], weights=sizes))
    assert found.standard_error[1] == pytest.approx((np.square((rises - mean) * sizes).sum() * 3 / 2) ** 0.5 / 39)


def test_an_effect_that_was_limited_keeps_its_share_of_the_error() -> None:
    given = replace(measurement([1.0] * 8, [3.0] * 8), factor=np.full((8, 16), 8**-0.5))
    found = with_runs(given, 16, [1], np.array([[0.2, 0.4, 0.3, 0.3]]), [1] * 4)
    assert found.standard_error is not None
    assert found.cost[1] == pytest.approx(0.3)
    assert found.standard_error[1] == pytest.approx(np.hypot(3.0, np.std([0.2, 0.4, 0.3, 0.3], ddof=1) / 2))


def test_a_run_that_is_lower_and_less_certain_leaves_the_estimate() -> None:
    given, vague = measurement([1.0] * 8, [0.4] * 8), np.array([0.2, 0.0, 0.0, 0.1])
    found = with_runs(given, 16, [1, 2], np.stack([vague, 40 * vague]), [1] * 4)
    assert found.ran is not None
    assert np.flatnonzero(found.ran).tolist() == [1, 2]
    assert found.cost[[1, 2]].tolist() == pytest.approx([1.0, 3.0])
    assert (with_runs(given, 400, [1], vague[None], [1] * 4).cost == given.cost).all()


def test_errors_of_estimates_grow_by_how_far_runs_are_from_them() -> None:
    given = measurement([1.0] * 8, [0.4] * 8)
    assert given.standard_error is not None
    exact = np.zeros(8, dtype=bool)
    exact[given.offsets[:-1]] = True
    for far, larger in ((0.1, 1.0), (2.0, 5.0)):
        found = with_runs(given, 16, [1, 2, 3], np.full((3, 4), 1 + far), [1] * 4)
        assert found.standard_error is not None
        rest = ~exact & ~np.isin(np.arange(8), [1, 2, 3])
        assert found.standard_error[rest].tolist() == pytest.approx([0.4 * larger] * rest.sum())
        assert (found.standard_error[exact] == given.standard_error[exact]).all()
        assert (found.standard_error[1:4] < 0.4).all()


def test_an_increase_that_rounding_explains_leaves_the_estimate() -> None:
    rises = np.array([[0.5] * 4, [1.5] * 4])
    found = with_runs(measurement([0.1] * 8, [1.0] * 8), 16, [1, 2], rises, [1] * 4, rounding=0.1)
    assert found.ran is not None
    assert np.flatnonzero(found.ran).tolist() == [2]
    assert found.cost[[1, 2]].tolist() == [0.1, 1.5]


def test_an_error_that_is_too_small_with_its_cost_does_not_hide_an_option() -> None:
    given = measurement([0, 9.0, 0.1, 0.1, 0, 1, 0.1, 0.1], [0, 0.0, 0.01, 0.01, 0, 0.5, 0.01, 0.01])
    assert options_to_run(given, 16)[0] == 1
    assert set(options_to_run(given, 16)).isdisjoint({0, 4})
    assert options_to_run(replace(given, tried=MappingProxyType({"0": "known"})), 16)[0] == 5


@pytest.mark.slow
def test_errors_of_costs_that_were_run_cover_the_truth() -> None:
    """Over random data: two standard errors cover the cost on very many samples nine times in ten."""
    model, generator = seeded(TiedLanguageModel), torch.Generator().manual_seed(0)
    true = qcompress.measure(model, [torch.randint(11, (2000, 6), generator=generator)], OPTIONS, method="direct").cost
    covered: list[NDArray[np.bool_]] = []
    for seed in range(40):
        data = [torch.randint(11, (24, 6), generator=torch.Generator().manual_seed(seed))]
        found = qcompress.measure(model, data, OPTIONS, method="sampled", seed=seed)
        assert found.ran is not None
        assert found.standard_error is not None
        covered.append((np.abs(found.cost - true) <= 2 * found.standard_error)[found.ran])
    assert np.concatenate(covered).mean() >= 0.9


def test_a_model_in_half_precision_is_run_in_float32() -> None:
    half = seeded(TiedLanguageModel).to(torch.bfloat16)
    full = seeded(TiedLanguageModel).to(torch.bfloat16).float()
    data = [torch.randint(11, (24, 6), generator=torch.Generator().manual_seed(0))]
    harsh = qcompress.prune_quantize(bits=(2, 3), sparsity=(0,))
    found, expected = (qcompress.measure(model, data, harsh, method="sampled") for model in (half, full))
    assert found.ran is not None
    assert found.ran.tolist() == 2 * [False, True, True]
    np.testing.assert_allclose(found.cost, expected.cost, rtol=0.05)  # codes are rounded to bfloat16


def test_a_model_that_asks_for_half_precision_is_not_run() -> None:
    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.bfloat16:
                raise TypeError(x.dtype)
            return super().forward(x)

    model = nn.Sequential(Half(8, 4)).to(torch.bfloat16)
    found = qcompress.measure(model, [drawn(8)[0].bfloat16()], OPTIONS, method="sampled")
    assert found.ran is None
    assert reruns.NOT_IN_FLOAT32 in found.notes


class Pole(nn.Linear):
    """A layer whose outputs are infinite where a weight is zero, as 2 bits make the small ones."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows, columns)
        self.weight.data = self.weight.data.sign() * torch.where(self.weight.data.abs() < 0.1, 0.3, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        rows = super().forward(x)
        return torch.tanh(rows) + 1e-3 / (self.weight != 0).all().float()


class Poles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.blocks = Pole(8, 16), nn.Linear(16, 5), nn.ModuleList([Pole(16, 16), Pole(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        rows: Tensor = self.head(x)
        return rows


@pytest.mark.parametrize("opened", [False, True])
def test_options_whose_loss_is_not_finite_are_left_out(opened: bool, tmp_path: Path) -> None:
    model, data = seeded(Poles), drawn(24)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model = qcompress.open_model(tmp_path, model=Poles, blocks="blocks") if opened else model
    harsh, mild = (
        qcompress.prune_quantize(bits=(2, 4), sparsity=(0,)),
        qcompress.prune_quantize(bits=(4,), sparsity=(0,)),
    )
    found = qcompress.measure(model, data, harsh, method="sampled")
    expected = qcompress.measure(model, data, {"head": harsh, "*": mild}, method="sampled")
    assert found.labels == expected.labels
    names = ", ".join(f"'{name}' at '2 bits'" for name in ("stem", "blocks.0", "blocks.1"))
    assert found.notes == (*expected.notes, reruns.NOT_FINITE + names)
    for name in ("cost", "standard_error", "factor", "error", "ran"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-8)
    assert found.resources["bytes"].tolist() == expected.resources["bytes"].tolist()
    assert sorted(found.codes) == sorted(expected.codes)


def test_a_part_without_an_option_whose_loss_is_finite_has_no_choice() -> None:
    two = qcompress.prune_quantize(bits=(2,), sparsity=(0,))
    found = qcompress.measure(nn.Sequential(seeded(lambda: Pole(8, 4))), drawn(8), two, method="sampled")
    assert found.labels == (("keep",),)
    assert [item.reason for item in found.kept] == [reruns.ALL_NOT_FINITE]
    assert found.cost.tolist() == [0.0]


@pytest.mark.parametrize("opened", [False, True])
def test_batches_that_are_not_taken_apart_count_by_their_rows(opened: bool, tmp_path: Path) -> None:
    model, (rows,) = seeded(Poles), drawn(39)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    parts = (rows[:32], 0.05 * rows[32:36], 0.02 * rows[36:])  # all are run
    data = [{"x": part, "other": torch.zeros(1)} for part in parts]
    more: dict[str, Any] = {"loss": "mse", "forward": lambda model, batch: model(batch["x"])}
    true = qcompress.measure(model, data, EVEN, method="direct", **more)
    model = qcompress.open_model(tmp_path, model=Poles, blocks="blocks") if opened else model
    found = qcompress.measure(model, data, EVEN, method="sampled", **more)
    assert found.ran is not None
    assert found.ran.sum() == 1
    np.testing.assert_allclose(found.cost[found.ran], true.cost[found.ran], rtol=1e-5)


def test_what_was_run_is_kept_by_files_and_by_engines(tmp_path: Path) -> None:
    found = small()
    assert found.ran is not None
    found.save(tmp_path / "m.npz")
    loaded = qcompress.Measurement.load(tmp_path / "m.npz").ran
    assert loaded is not None
    assert loaded.tolist() == found.ran.tolist()


def test_the_errors_of_costs_that_were_run_add_up_as_they_are_of_the_same_samples() -> None:
    found, choice = small(), np.array([1, 1])
    assert found.ran is not None
    assert found.standard_error is not None
    alone = replace(found, ran=np.ones(8, dtype=bool))
    problem = qcompress.formulate(alone, {"bytes": 1.0}, pairs=False)
    assert prediction_error(alone, problem, choice) == pytest.approx(found.standard_error[[1, 5]].sum())


def test_progress_tells_of_the_samples_that_options_are_run_on() -> None:
    seen: list[MeasureProgress] = []
    small(on_progress=seen.append)
    runs = [(step.batches, step.total_batches) for step in seen if step.unit != "batches"]
    assert runs == [(number + 1, 4) for number in range(4)]
    assert sample_places(16) == [0, 4, 8, 12]
