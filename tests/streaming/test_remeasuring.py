"""Opened models measured around a choice, and refined: the numbers of the model in memory, also after interruptions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

import qcompress
from qcompress.errors import DataError, ModelError, OptionsError
from qcompress.measuring.streamed.effects import StreamedEffects
from qcompress.measuring.streamed.forecast import COMPILING, room_left
from qcompress.measuring.streamed.sweep import BlockSweep
from qcompress.model.opened import open_model
from tests.measuring.streamed.test_streamed import CutError
from tests.opened_models import in_memory, saved, tokens
from tests.streaming.test_opened_choices import data, random_choice

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning")

NEAREST = qcompress.prune_quantize(bits=(2, 3, 4), group_size=16)
COMPENSATED = qcompress.prune_quantize(bits=(3, 4), group_size=16, compensated=True)


Case = tuple[Path, qcompress.Measurement, qcompress.Measurement]


@pytest.fixture(scope="module", params=["nearest", "compensated", "tied", "inputs first", "mse"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A folder, the measurement of its model in memory, and of the opened one."""
    place, tied = tmp_path_factory.mktemp("case"), request.param == "tied"
    folder = (
        saved("GPT2", place) if request.param == "inputs first" else saved("Llama", place, tie_word_embeddings=tied)
    )
    options, loss = (
        COMPENSATED if request.param == "compensated" else NEAREST,
        "mse" if request.param == "mse" else "kl",
    )
    whole, opened = (
        qcompress.measure(model, data(), options, method="sampled", loss=loss)
        for model in (in_memory(folder), open_model(folder))
    )
    return folder, whole, opened


@pytest.mark.parametrize("seed", [3, 4])
def test_the_numbers_around_a_choice_are_those_in_memory(case: Case, seed: int) -> None:
    folder, whole, opened = case
    choice = random_choice(opened, seed)
    expected = qcompress.remeasure(in_memory(folder), data(), whole, choice)
    found = qcompress.remeasure(open_model(folder), data(), opened, choice)
    assert found.standing == expected.standing == tuple(choice)
    assert found.standing_loss == pytest.approx(expected.standing_loss, rel=1e-4)
    # float32 sums in another order; of costs near zero the difference counts against the largest
    scale = float(np.abs(expected.cost).max())
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-3, atol=1e-4 * scale)
    gram, wanted = (own.factor @ own.factor.T for own in (found, expected))
    np.testing.assert_allclose(gram, wanted, rtol=1e-3, atol=1e-4 * float(np.abs(wanted).max()))
    assert found.standard_error is not None
    assert expected.standard_error is not None
    np.testing.assert_allclose(found.standard_error, expected.standard_error, rtol=1e-2, atol=1e-3 * scale)


def test_options_of_the_choice_itself_cost_nothing(case: Case) -> None:
    folder, _, opened = case
    choice = random_choice(opened, 5)
    found = qcompress.remeasure(open_model(folder), data(), opened, choice)
    starts = np.cumsum([0, *(len(options) for options in opened.transforms)])[:-1]
    assert not found.cost[starts + choice].any()
    assert not found.factor[starts + choice].any()


def test_refining_ends_as_in_memory_and_never_worse(case: Case, tmp_path: Path) -> None:
    folder, whole, opened = case
    results = []
    for model, measurement in ((in_memory(folder), whole), (open_model(folder), opened)):
        problem = qcompress.formulate(measurement, {"bytes": 0.4}, pairs=False)
        start = [1] * len(measurement.parts)
        result = qcompress.refine(
            model,
            data(),
            measurement,
            problem,
            start,
            solver="dp",
            rounds=2,
            cache=tmp_path / f"{len(results)}",
        )
        assert problem.evaluate(result.choice).feasible
        assert result.steps
        assert result.loss < result.loss_before
        results.append(result)
    assert results[1].loss_before == pytest.approx(results[0].loss_before, rel=1e-4)
    assert results[1].choice.tolist() == results[0].choice.tolist()
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-4)
    assert [step.changes for step in results[1].steps] == [step.changes for step in results[0].steps]


def cut_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, count: int) -> None:
    """Let the method fail at its ``count``-th call."""
    left, method = [count], getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise CutError
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("owner", "name", "count", "left"),
    [
        (BlockSweep, "through", 5, 5),
        (BlockSweep, "through", 15, 5),
        (StreamedEffects, "_unit", 1, 5),
        (StreamedEffects, "_unit", 4, 2),
    ],
)
def test_an_interrupted_measurement_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, count: int, left: int
) -> None:
    """With a loader that shuffles, whose order must be drawn again."""
    folder = saved("Llama", tmp_path / "model")
    shuffled = DataLoader(tokens(3, 9, seed=1), batch_size=2, shuffle=True)  # type: ignore[arg-type, var-annotated]
    opened = qcompress.measure(open_model(folder), shuffled, NEAREST, method="sampled")
    choice = random_choice(opened, 6)
    torch.manual_seed(1)
    expected = qcompress.remeasure(open_model(folder), shuffled, opened, choice)
    cache = tmp_path / "cache"
    with monkeypatch.context() as patched:
        cut_at(patched, owner, name, count)
        with pytest.raises(CutError):
            qcompress.remeasure(open_model(folder), shuffled, opened, choice, cache=cache)
    with pytest.raises(DataError, match="files of another measurement"):
        qcompress.remeasure(open_model(folder), shuffled, opened, [0] * len(choice), cache=cache)
    torch.manual_seed(2)
    done, seen = counted(monkeypatch, StreamedEffects, "_unit"), list[int]()
    found = qcompress.remeasure(
        open_model(folder), shuffled, opened, choice, cache=cache, on_progress=lambda told: seen.append(told.batches)
    )
    assert not cache.exists()
    assert found.cost.tolist() == expected.cost.tolist()
    assert found.factor.tolist() == expected.factor.tolist()
    assert len(done) == left
    assert seen == sorted(seen)
    assert seen[-1] == 11


def counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[None]:
    """A list that grows with every call of the method."""
    calls, method = list[None](), getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls


def test_a_refinement_that_is_cut_between_solves_measures_no_block_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = saved("Llama", tmp_path / "model"), tmp_path / "refined.json"
    opened = qcompress.measure(open_model(folder), data(), NEAREST, method="sampled")
    problem = qcompress.formulate(opened, {"bytes": 0.4}, pairs=False)
    start = [1] * len(opened.parts)

    def refined(rounds: int = 2) -> qcompress.Refined:
        words: dict[str, Any] = {"solver": "dp", "rounds": rounds, "cache": cache}
        return qcompress.refine(open_model(folder), data(), opened, problem, start, **words)

    with monkeypatch.context() as patched:
        patched.setattr("qcompress.refinement.solve", raising)
        with pytest.raises(CutError):
            refined()
    assert (tmp_path / "refined.json.part").is_dir()
    done = counted(monkeypatch, StreamedEffects, "_unit")
    assert refined(1).steps
    assert not done
    assert not (tmp_path / "refined.json.part").exists()


def raising(*_: Any, **__: Any) -> None:
    raise CutError


def test_a_whole_run_refines_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("Llama", tmp_path / "model")

    def run(place: Path, budget: float = 4.2) -> qcompress.Result:
        return qcompress.compress(
            open_model(folder), [tokens(4, 9, seed=seed) for seed in range(4)], budget={"bits_per_weight": budget},
            options=NEAREST, method="sampled", refine_rounds=2, time_limit=2, folder=place, memory="8 GB",
        )  # fmt: skip

    expected = run(tmp_path / "uncut")
    with monkeypatch.context() as patched:
        cut_at(patched, StreamedEffects, "_unit", 8)  # in the first round: five units were measured before
        with pytest.raises(CutError):
            run(tmp_path / "cut")
    result = run(tmp_path / "cut")
    refined = result.report.refined
    assert refined is not None
    assert refined["loss"] <= refined["loss_before"]
    assert refined == expected.report.refined
    assert result.solution.choice is not None
    assert result.solution.choice.tolist() == expected.solution.choice.tolist()
    with monkeypatch.context() as patched:
        cut_at(patched, StreamedEffects, "_unit", 8)
        with pytest.raises(CutError):
            run(tmp_path / "other")
    assert run(tmp_path / "other", budget=5.0).report.refined is not None  # what the cut run left is of no use


def test_too_little_memory_is_told_before_anything_is_encoded(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit lies between what measuring takes and what two models take."""
    folder, _, opened = case
    model = open_model(folder)
    need = []
    monkeypatch.setattr("qcompress.streaming.around.resident_bytes", lambda: 0)

    def noted(memory: int, base: int, units: Any, most: int) -> int:
        need.append(max(unit.total for unit in units))
        return room_left(memory, base, units, most)

    monkeypatch.setattr("qcompress.streaming.around.room_left", noted)
    choice, cache = random_choice(opened, 1), tmp_path / "cache"
    with pytest.raises(OptionsError, match="are needed"):
        qcompress.remeasure(model, data(), opened, choice, memory=COMPILING, cache=cache)
    assert not list(cache.rglob("*.safetensors"))
    enough = COMPILING + need[0]
    with pytest.raises(OptionsError, match="are needed"):
        qcompress.remeasure(model, data(), opened, choice, memory=enough - 1, cache=cache)
    found = qcompress.remeasure(model, data(), opened, choice, memory=enough, cache=cache)  # decoding for each sample
    np.testing.assert_allclose(found.cost, qcompress.remeasure(model, data(), opened, choice).cost, rtol=1e-6)


def test_compress_tells_before_measuring_that_refining_takes_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(saved("Llama", tmp_path / "model"))
    monkeypatch.setattr("qcompress.streaming.around.forecast_memory", lambda *_: 10**9)
    words: dict[str, Any] = {"options": NEAREST, "method": "sampled", "budget": {"bits_per_weight": 4.2}}
    with pytest.raises(OptionsError, match="are needed to measure around the choice"):
        qcompress.compress(model, data(), refine_rounds=1, memory=10**9, **words)


def test_wrong_arguments_are_refused(case: Case) -> None:
    folder, whole, opened = case
    model = open_model(folder)
    choice = [0] * len(opened.parts)
    with pytest.raises(OptionsError, match="one process, found jobs=2"):
        qcompress.remeasure(model, data(), opened, choice, jobs=2)
    with pytest.raises(OptionsError, match="memory= is for models that are read block by block"):
        qcompress.remeasure(in_memory(folder), data(), whole, choice, memory="1 GB")
    problem = qcompress.formulate(whole, {"bytes": 0.4}, pairs=False)
    with pytest.raises(OptionsError, match="memory= is for models that are read block by block"):
        qcompress.refine(in_memory(folder), data(), whole, problem, choice, memory="1 GB")
    with pytest.raises(ModelError, match="chooses for 1 groups"):
        qcompress.remeasure(model, data(), opened, [0])


def test_a_model_in_half_precision_has_about_the_numbers_in_memory(tmp_path: Path) -> None:
    folder = saved("Llama", tmp_path, dtype=torch.bfloat16)
    opened = qcompress.measure(open_model(folder), data(), NEAREST, method="sampled")
    choice = random_choice(opened, 1)
    expected, found = (
        qcompress.remeasure(model, data(), opened, choice) for model in (in_memory(folder), open_model(folder))
    )
    # gradients between blocks are rounded to 8 bits: 2 % of the largest cost
    np.testing.assert_allclose(found.cost, expected.cost, atol=0.02 * float(np.abs(expected.cost).max()))
    assert found.standing_loss == pytest.approx(expected.standing_loss, rel=0.02)


class Gated(nn.Module):
    """A block whose gate closes if its weight is small."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(torch.relu(self.inner(x)))
        return out


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Gated() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = 0.9 * torch.tanh(self.stem(x))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def test_what_no_gradient_reaches_around_a_choice_keeps_its_differences(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Gates()
    with torch.no_grad():  # inputs are below .9: units of the first block pass something on only by several weights
        network.blocks[0].inner.weight.copy_(torch.randint(2, (8, 8)) * 2 - 1).fill_diagonal_(1.2)
        network.blocks[0].inner.bias.fill_(-1.2)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    model = qcompress.open_model(tmp_path, model=Gates, blocks="blocks")
    inputs = [torch.randn(16, 8)]
    measurement = qcompress.measure(
        model, inputs, qcompress.prune_quantize(bits=(2, 4), sparsity=(0, 0.97)), method="sampled"
    )
    names = [part.name for part in measurement.parts]
    place = names.index("blocks.0.inner")
    empty = int(
        np.argmin([option.size_bytes(measurement.parts[place].target) for option in measurement.transforms[place]])
    )
    choice = [0] * len(names)
    choice[place] = empty
    found = qcompress.remeasure(model, inputs, measurement, choice)
    starts = np.cumsum([0, *(len(options) for options in measurement.transforms)])
    own = slice(starts[place], starts[place + 1])
    np.testing.assert_allclose(found.cost[own], measurement.cost[own] - measurement.cost[own][empty])
    assert "'blocks.0.inner' keeps its differences in cost" in "\n".join(found.notes)
    before = names.index("stem")
    assert found.cost[starts[before] + 1 : starts[before + 1]].any()
