"""Ranks in the problem of channels and bits: exact bytes and macs, the network that was asked for, and its file."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import (
    apply,
    compress,
    compressed_size,
    formulate,
    load_compressed,
    low_rank,
    measure,
    prune_channels,
    prune_quantize,
    save_compressed,
    time_options,
)
from qcompress.compressed.factored import Factored
from qcompress.compressed.record import record_of
from qcompress.errors import OptionsError
from qcompress.measurement import Measurement
from qcompress.measuring import thinning
from qcompress.model.counting import count
from qcompress.options import transform_from_json
from qcompress.report import Report
from qcompress.structure.coded import USES, CodedLayer
from qcompress.transforms.base import Keep, Transform
from qcompress.transforms.channels import Jointly, RemoveChannels
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from solvers import Status, judge, solve
from tests.quick import slow_but
from tests.structure.random_channels import random_network

CHANNELS = prune_channels(keep=(0.75, 0.5))
BITS = prune_quantize(bits=(4,), sparsity=(0,), compensated=True)
RANKS = low_rank(ratios=(0.2, 0.4), kinds=("channels",))
KINDS = low_rank(ratios=(0.3,), kinds=("channels", "spatial", "tucker", "sliced"), slices=(2,))


class Chain(nn.Module):
    """Linear layers, two of them around a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.wide, self.back, self.head = (
            nn.Linear(10, 24), nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(24, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        return self.head(x + self.back(self.wide(x).relu()))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return make().eval()


def chain() -> nn.Module:
    return seeded(Chain)


def images_network() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 12, (1, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4),
        )
    )  # fmt: skip


def vectors() -> list[Tensor]:
    return list(torch.randn(48, 10, generator=torch.Generator().manual_seed(0)).split(16))


def images() -> list[Tensor]:
    return list(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(12))


@pytest.fixture(scope="module")
def measured() -> Measurement:
    return measure(chain(), vectors(), CHANNELS + BITS + RANKS + RANKS.then(BITS), loss="mse")


def codes_in(measurement: Measurement) -> dict[str, set[Transform]]:
    """Codes on offer by layer."""
    found: dict[str, set[Transform]] = {}
    for part, options in zip(measurement.parts, measurement.transforms, strict=True):
        for option in options:
            if isinstance(option, Jointly):
                for name, code in zip(option.layers, option.codes, strict=True):
                    found.setdefault(name, set()).add(code)
            elif not isinstance(option, (Keep, RemoveChannels)):
                found.setdefault(part.path, set()).add(option)
    return found


def ranks_in(measurement: Measurement) -> dict[str, set[Transform]]:
    """Ranks on offer by layer that has some."""
    ranked = {name: {code for code in own if isinstance(code, LowRank)} for name, own in codes_in(measurement).items()}
    return {name: own for name, own in ranked.items() if own}


def check(model: nn.Module, data: list[Tensor], measurement: Measurement, choices: int, seed: int = 0) -> int:
    """Compare predicted uses of random choices with those of the applied networks; return how many layers had ranks."""
    problem = formulate(measurement, {"bytes": 1.0, "macs": 1.0})
    assert problem.evaluate([0] * problem.num_groups).usage == pytest.approx(dict(measurement.original), rel=1e-12)
    rng, factored = np.random.default_rng(seed), 0
    for _ in range(choices):
        judged = judge(problem, np.array([rng.integers(len(options)) for options in measurement.transforms]))
        smaller = apply(model, measurement, judged)
        record = record_of(smaller)
        assert record is not None
        assert record.payload_bytes is not None
        # codes and masks are rounded to whole bytes: less than four bytes for each stored matrix are reserved
        matrices = sum(max(len(item.factors), 1) for item in record.parts)
        assert 0 <= judged.usage["bytes"] + 1e-6 - record.payload_bytes <= 4 * matrices
        assert compressed_size(smaller).payload_bytes == record.payload_bytes
        assert count(smaller, data, None).macs == pytest.approx(judged.usage["macs"], rel=1e-9)
        factored += sum(isinstance(module, Factored) for module in smaller.modules())
    return factored


def test_uses_of_any_choice_of_a_chain_are_as_predicted(measured: Measurement) -> None:
    assert set(ranks_in(measured)) == {"enter", "wide", "back", "head"}
    assert check(chain(), vectors(), measured, 30) > 10


def test_uses_of_any_choice_of_convolutions_of_all_kinds_are_as_predicted() -> None:
    model, data = images_network(), images()
    sparse = prune_quantize(bits=(5,), sparsity=(0.5,))
    measurement = measure(model, data, CHANNELS + BITS + KINDS + KINDS.then(sparse), loss="mse")
    forms = {code.form for own in ranks_in(measurement).values() for code in own if isinstance(code, LowRank)}
    assert forms == {"channels", "spatial", "tucker", "sliced"}
    assert check(model, data, measurement, 30) > 10


@pytest.mark.parametrize("seed", slow_but([0, 3], range(8)))
def test_uses_in_any_network_are_as_predicted(seed: int) -> None:
    data = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
    options = prune_channels(keep=(0.75, 0.5, 0)) + low_rank(ratios=(0.3, 0.6), kinds=("channels", "spatial"))
    measurement = measure(random_network(seed), data, options, loss="mse")
    check(random_network(seed), data, measurement, 6, seed)


def test_layers_left_out_take_nothing_whatever_their_rank() -> None:
    model, data = chain(), vectors()
    measurement = measure(model, data, prune_channels(keep=(0.5, 0)) + BITS + RANKS, loss="mse")
    (wide,) = (place for place, part in enumerate(measurement.parts) if part.name == "wide")
    gone = [option for option in measurement.transforms[wide] if "0 of 32" in option.label]
    assert [option.label for option in gone] == ["0 of 32 channels"]  # nothing is left to store in any way
    problem = formulate(measurement, {"macs": 1.0})
    choice = np.array([len(options) - 1 for options in measurement.transforms])
    choice[wide] = measurement.transforms[wide].index(gone[0])
    judged = judge(problem, choice)
    smaller = apply(model, measurement, judged)
    assert count(smaller, data, None).macs == judged.usage["macs"]
    assert {name.split(".")[0] for name, _ in smaller.named_parameters()} == {"enter", "back", "head"}  # back's bias
    check(model, data, measurement, 10)


def test_channels_ranks_and_bits_keep_both_budgets_and_a_file_holds_the_result(tmp_path: Path) -> None:
    model, data = images_network(), images()
    options = CHANNELS + BITS + KINDS + KINDS.then(BITS)
    budget: Any = {"macs": 0.35, "bytes": 0.14}
    result = compress(model, data, budget=budget, options=options, loss="mse", time_limit=1, folder=tmp_path)
    report, original = result.report, result.report.original
    assert count(result.model, data, None).macs == pytest.approx(report.usage["macs"], rel=1e-9)
    assert report.usage["macs"] <= 0.35 * original["macs"]
    assert not any("predicted from a trace" in warning for warning in report.warnings)  # up to what is reserved
    saved = save_compressed(result.model, tmp_path / "small.st")
    assert saved.payload_bytes == compressed_size(result.model).payload_bytes <= report.usage["bytes"]
    assert report.usage["bytes"] <= 0.14 * original["bytes"]
    loaded = load_compressed(saved.path, images_network)
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), result.model(data[0]))
    result.measurement.save(tmp_path / "measured.npz")
    read = Measurement.load(tmp_path / "measured.npz")
    assert (read.transforms, read.coded) == (result.measurement.transforms, result.measurement.coded)
    for transform in read.transforms[0]:
        assert transform_from_json(transform.to_json()) == transform


def test_the_optimum_is_at_least_as_good_as_without_ranks(measured: Measurement) -> None:
    for macs, size in ((0.7, 0.15), (0.5, 0.3), (0.35, 0.2)):
        problem = formulate(measured, {"macs": macs, "bytes": size})
        free = solve(problem, "milp", time_limit=20)
        ranked = np.concatenate([[_has_rank(option) for option in options] for options in measured.transforms])
        without = problem.derived(cost=np.where(ranked, 1e6, problem.cost))
        plain = solve(without, "milp", time_limit=20)
        assert free.status is Status.OPTIMAL
        assert free.objective is not None
        assert plain.objective is not None
        assert free.objective <= plain.objective + 1e-9
    assert any(_has_rank(options[chosen]) for options, chosen in zip(measured.transforms, free.choice, strict=True))


def _has_rank(option: Transform) -> bool:
    codes = option.codes if isinstance(option, Jointly) else (option,)
    return any(isinstance(code, LowRank) for code in codes)


def test_a_rank_that_a_smallest_weight_does_not_have_is_not_on_offer_and_said() -> None:
    model, data = chain(), vectors()
    options = prune_channels(keep=(0.75, 0.25)) + low_rank(ranks=(4, 5, 7), kinds=("channels",))
    measurement = measure(model, data, options, loss="mse")
    # `enter` and `head` meet the 24 channels of the sum, `wide` and `back` also those inside, which are their own
    ranks = {name: sorted(rank for code in own for rank in code.ranks) for name, own in ranks_in(measurement).items()}
    assert ranks == {"enter": [4, 5], "wide": [4, 5], "back": [4, 5], "head": [4]}
    noted = measure(model, data, prune_channels(keep=(0.1,)) + low_rank(ranks=(4,)) + BITS, loss="mse").notes
    why = "of the 2×10 weights that may stay, the largest ranks of the weight are 2"
    assert f"enter: no ranks beside channels, {why}" in noted


def test_combinations_with_a_width_that_lacks_the_rank_are_left_out() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)))
    options = prune_channels(keep=(0.75, 0.25)) + low_rank(ranks=(3, 5), kinds=("channels",), whitened=False)
    measurement = measure(model, vectors(), {"2": options, "0": prune_channels(keep=(0.75,))}, loss="mse")
    labels = measurement.labels[[part.name for part in measurement.parts].index("2")]
    assert labels == (
        "keep", "2: rank 3", "2: rank 5",
        "12 of 16 channels", "12 of 16 channels; 2: rank 3", "12 of 16 channels; 2: rank 5",
        "4 of 16 channels", "4 of 16 channels; 2: rank 3",
    )  # fmt: skip


class Branches(nn.Module):
    """A layer reads the outputs of two others beside each other, of which nothing may be left."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.left, self.right = nn.Linear(10, 24), nn.Linear(24, 16), nn.Linear(24, 16)
        self.join, self.head = nn.Linear(32, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        return self.head(x + self.join(torch.cat([self.left(x).relu(), self.right(x).relu()], dim=1)))


def test_a_layer_of_which_several_sets_may_leave_nothing_has_no_ranks_and_it_is_said() -> None:
    model, data = seeded(Branches), vectors()
    for least, ranked in ((0, False), (0.25, True)):
        options = prune_channels(keep=(0.5, least)) + BITS + low_rank(ranks=(2,), kinds=("channels",))
        measurement = measure(model, data, options, loss="mse")
        assert ("join" in ranks_in(measurement)) == ranked
        said = "join: no ranks beside channels, several coupled sets together may leave nothing of it"
        assert (said in measurement.notes) != ranked
        check(model, data, measurement, 10)


class Mixer(nn.Module):
    """Positions are mixed by a layer whose work grows with the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mix, self.head = nn.Linear(6, 16), nn.Linear(12, 12, bias=False), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        return self.head((x + self.mix(x.transpose(1, 2)).transpose(1, 2)).mean(dim=1))


def test_a_layer_whose_macs_do_not_follow_from_its_shape_has_no_ranks_and_it_is_said() -> None:
    model, data = seeded(Mixer), [torch.randn(8, 12, 6, generator=torch.Generator().manual_seed(0))]
    measurement = measure(model, data, CHANNELS + BITS + low_rank(ranks=(1, 2), kinds=("channels",)), loss="mse")
    assert "mix" in codes_in(measurement)
    assert "mix" not in ranks_in(measurement)
    (note,) = (note for note in measurement.notes if note.startswith("mix:"))
    assert note.endswith("its multiply-accumulates depend on the channels of 'enter', whose positions it mixes")
    check(model, data, measurement, 10)
    alone = measure(model, data, CHANNELS + low_rank(ranks=(1, 2), kinds=("channels",)), loss="mse")
    assert {item.name: item.reason for item in alone.skipped}["mix"] in note


class Reads(Chain):
    """It checks the class of a layer."""

    def forward(self, x: Tensor) -> Tensor:
        if type(self.wide) is not nn.Linear:
            raise TypeError("no Linear")
        return super().forward(x)


def test_a_layer_that_the_network_needs_itself_has_no_ranks_and_it_is_said() -> None:
    measurement = measure(seeded(Reads), vectors(), CHANNELS + BITS + RANKS, loss="mse")
    assert set(ranks_in(measurement)) == {"enter", "back", "head"}
    assert any("wide" in note and "the network needs the layer itself" in note for note in measurement.notes)


def test_too_many_combinations_thin_out_ranks_before_layers_share_codes(
    measured: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, options = chain(), vectors(), CHANNELS + BITS + RANKS + RANKS.then(BITS)
    monkeypatch.setattr(thinning, "MAX_OPTIONS", 30)
    thinned = measure(model, data, options, loss="mse")
    place = [part.name for part in measured.parts].index("wide")
    bits_only = {option for option in measured.transforms[place] if not _has_rank(option)}
    assert bits_only < set(thinned.transforms[place]) < set(measured.transforms[place])
    assert any("all without ranks and the best at some prices and in use" in note for note in thinned.notes)
    monkeypatch.setattr(thinning, "MAX_OPTIONS", 11)
    shared = measure(model, data, options, loss="mse")
    assert any(_has_rank(option) for option in shared.transforms[place])
    assert any("those alike in all layers and the best at some prices and in use" in note for note in shared.notes)
    check(model, data, shared, 5)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_combination_at_a_price_is_never_left_out(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    parts = [part for part in measure(chain(), vectors(), BITS).parts if part.name in ("wide", "back")]
    layers = [CodedLayer(part=part, rows=(1.0, {}), columns=(1.0, {}), home=0) for part in parts]
    own = (Keep(), *(PruneQuantize(bits) for bits in (2, 4, 8)), *(LowRank(ranks=rank) for rank in (1, 2, 4, 8)))
    costs = [np.array([0.0, *rng.random(len(own) - 1)]) for _ in parts]
    monkeypatch.setattr(thinning, "MAX_OPTIONS", 100)
    chosen, left_out = thinning.chosen_codes(2, layers, [own, own], costs)
    assert left_out
    assert 2 * len(chosen) <= 2 * 100  # all that fit, and as many again at most
    tables = [
        (cost, *(np.array([use(code, part.target) for code in own], dtype=float) for use in USES.values()))
        for part, cost in zip(parts, costs, strict=True)
    ]
    largest = np.max([[table.max() for table in tables_of] for tables_of in tables], axis=0)
    for prices in itertools.product(thinning.PRICES[::4], repeat=2):
        weights = np.array([1.0, *prices]) / largest
        values = [sum(weight * table for weight, table in zip(weights, own, strict=True)) for own in tables]
        assert min(values[0][i] + values[1][j] for i, j in chosen) == pytest.approx(values[0].min() + values[1].min())


def test_a_decision_on_channels_alone_has_all_of_its_widths() -> None:
    assert thinning.chosen_codes(thinning.MAX_OPTIONS + 1, [], [], []) == ([()], "")


def test_the_least_use_of_every_layer_is_on_offer_however_small_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small layer's codes matter at no price that is stated relative to a large one's use."""
    monkeypatch.setattr(thinning, "MAX_OPTIONS", 12)
    part = measure(chain(), vectors(), BITS).parts[0]
    targets = (replace(part.target, channels=channels, macs=channels * 10.0) for channels in (2_000_000, 3))
    parts = [replace(part, target=target) for target in targets]
    layers = [CodedLayer(part=own, rows=(1.0, {}), columns=(1.0, {}), home=0) for own in parts]
    own = (Keep(), *(PruneQuantize(bits) for bits in (2, 4, 8)), *(LowRank(ranks=rank) for rank in (1, 2)))
    costs = [np.array([0.0, 0.1, 1e-2, 1e-3, 0.5, 0.2])] * 2
    chosen, left_out = thinning.chosen_codes(2, layers, [own, own], costs)
    assert left_out
    for use in USES.values():
        least = sum(min(use(code, layer.part.target) for code in own) for layer in layers)
        uses = [
            sum(use(own[place], layer.part.target) for place, layer in zip(row, layers, strict=True)) for row in chosen
        ]
        assert min(uses) == pytest.approx(least, abs=1e-6)


def test_more_bits_on_offer_take_no_rank_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that pay stay on offer, however many combinations of bits there are."""
    monkeypatch.setattr(thinning, "MAX_OPTIONS", 60)
    objectives = []
    for bits in ((4, 8), (2, 3, 4, 6, 8)):
        options = CHANNELS + prune_quantize(bits=bits, sparsity=(0,)) + RANKS.then(BITS)
        problem = formulate(measure(chain(), vectors(), options, loss="mse"), {"macs": 0.4, "bytes": 0.2})
        solution = solve(problem, "milp", time_limit=20)
        assert solution.status is Status.OPTIMAL
        objectives.append(solution.objective)
    assert objectives[1] <= objectives[0] * (1 + 1e-9)


def test_ranks_are_chosen_in_the_last_round_for_channels_that_the_first_choice_keeps() -> None:
    given: Any = {"options": CHANNELS + RANKS, "loss": "mse", "time_limit": 1, "rounds": 2, "solver": "greedy"}
    result = compress(chain(), vectors(), budget={"macs": 0.4}, **given)
    start, *later = result.report.rounds
    assert len(later) == 2
    assert later[0].usage["macs"] > start.usage["macs"]  # ranks save the rest
    assert later[-1].usage["macs"] <= 0.4 * result.report.original["macs"]
    assert count(result.model, vectors(), None).macs == pytest.approx(result.report.usage["macs"], rel=1e-9)


def test_what_is_not_supported_with_ranks_is_refused_before_any_pass(
    measured: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = chain(), vectors()
    with pytest.raises(OptionsError, match="factors in place of layers have no times of their own beside channels"):
        time_options(model, measured, data[0])
    monkeypatch.setattr(Chain, "forward", None)
    refused = r"a budget for latency_s with ranks is not supported for channels: give one for macs"
    for source in ({"options": CHANNELS + RANKS}, {"measurement": measured}):
        with pytest.raises(OptionsError, match=refused):
            compress(model, data, budget={"latency_s": 0.5}, **source)  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match=r"target= is not supported for channels"):
        compress(model, data, budget={"bytes": 0.5}, options=CHANNELS + RANKS, target="onnxruntime")


def test_the_report_says_which_layers_have_no_ranks_and_comes_back(tmp_path: Path) -> None:
    options = prune_channels(keep=(0.75, 0.25)) + low_rank(ranks=(7,), kinds=("channels",)) + prune_quantize(bits=(8,))
    result = compress(chain(), vectors(), options=options, budget={"macs": 0.8}, loss="mse", time_limit=2)
    assert result.report.measuring == result.measurement.notes != ()
    assert f"- measuring: {result.measurement.notes[0]}" in result.report.to_markdown()
    result.report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").measuring == result.report.measuring
