"""Channels and codes as options of one problem: exact bytes, the network that was asked for, and its file."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompress
from qcompress import compress, formulate, measure, prune_channels, prune_quantize
from qcompress.compressed.record import record_of
from qcompress.errors import ModelError, OptionsError
from qcompress.guard import KeptLoss
from qcompress.measurement import Measurement
from qcompress.measuring import thinning
from qcompress.measuring.channels import TRIED
from qcompress.measuring.pair_terms import PAIR_STRENGTH
from qcompress.measuring.recoded import fitted_in_turn
from qcompress.measuring.true_loss import mean_loss
from qcompress.model.counting import count
from qcompress.options import integer_products, transform_from_json
from qcompress.proposals import Proposal
from qcompress.structure.coded import coded_layers, use_form
from qcompress.structure.find import find_sets
from qcompress.structure.tabulated import Tabulated
from qcompress.transforms.base import Keep
from qcompress.transforms.channels import Jointly, RemoveChannels
from qcompress.transforms.quantize.prune_quantize import PruneQuantize
from solvers import judge
from tests.quick import slow_but
from tests.structure.random_channels import random_network

CHANNELS = prune_channels(keep=(0.75, 0.5))
CODES = prune_quantize(bits=(8, 3), sparsity=(0,), compensated=True)


def network() -> nn.Module:
    """Convolutions around a shortcut, a depthwise one, and a head."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
            self.each, self.back = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1)
            self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            x = x + self.norm(self.back(torch.relu(self.each(torch.relu(self.wide(x))))))
            return self.head(x.mean(dim=(2, 3)))

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Residual().eval()


def images(samples: int = 48) -> list[Tensor]:
    return list(torch.randn(samples, 3, 6, 6, generator=torch.Generator().manual_seed(0)).split(12))


@pytest.fixture(scope="module")
def measured() -> Measurement:
    return measure(network(), images(), CHANNELS + CODES)


@pytest.mark.parametrize("seed", slow_but([0, 2], range(3)))
def test_bytes_and_macs_of_any_choice_are_as_predicted(seed: int) -> None:
    model, data = random_network(seed), [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))]
    options = CHANNELS + prune_quantize(bits=(3, 4), sparsity=(0, 0.5))
    measurement = measure(model, data, options, loss="mse")
    problem = formulate(measurement, {"bytes": 1.0, "macs": 1.0})
    assert problem.evaluate([0] * problem.num_groups).usage == pytest.approx(dict(measurement.original))
    rng = np.random.default_rng(seed)
    for _ in range(6):
        judged = judge(problem, np.array([rng.integers(len(options)) for options in measurement.transforms]))
        smaller = qcompress.apply(model, measurement, judged)
        record = record_of(smaller)
        assert record is not None
        assert record.payload_bytes is not None
        # codes and masks are rounded up to whole bytes: less than two bytes more a layer are reserved
        assert 0 <= judged.usage["bytes"] + 1e-6 - record.payload_bytes <= 2 * len(measurement.coded)
        assert count(smaller, data, None).macs == pytest.approx(judged.usage["macs"], rel=1e-9)
        with torch.no_grad():
            assert smaller(data[0]).shape == model(data[0]).shape


def test_codes_are_decided_with_a_set_only_where_a_layer_joins_two(measured: Measurement) -> None:
    homes = [part.name for part in measured.parts]
    assert homes == ["stem", "wide", "codes of stem", "codes of each", "codes of head"]
    combined = measured.transforms[1]
    assert len(combined) == 3 * 3 * 3  # widths, codes of the layer before, codes of the layer after
    assert combined[0] == Keep()
    last = combined[-1]
    assert isinstance(last, Jointly)
    assert last.layers == ("wide", "back")
    assert last.label == "6 of 12 channels; wide: 3 bits, compensated; back: 3 bits, compensated"
    assert transform_from_json(last.to_json()) == last


def test_costs_of_combinations_are_sums_and_half_the_pair_terms(measured: Measurement) -> None:
    rows = {label: place for place, label in enumerate(measured.labels[1])}
    narrow, coded = rows["6 of 12 channels"], rows["back: 3 bits, compensated"]
    both = rows["6 of 12 channels; back: 3 bits, compensated"]
    start = len(measured.transforms[0])
    cost, factor = measured.cost[start:], measured.factor[start:]
    np.testing.assert_allclose(factor[both], factor[narrow] + factor[coded], atol=1e-12)
    within = PAIR_STRENGTH * float(factor[narrow] @ factor[coded])
    assert cost[both] == pytest.approx(cost[narrow] + cost[coded] + within, rel=1e-9)


def test_a_removal_costs_what_it_costs_without_codes(measured: Measurement) -> None:
    alone = measure(network(), images(), CHANNELS)
    for part, labels in enumerate(alone.labels):
        for option, label in enumerate(labels):
            place = measured.labels[part].index(label)
            flat = sum(map(len, measured.labels[:part])) + place
            assert measured.cost[flat] == pytest.approx(
                alone.cost[sum(map(len, alone.labels[:part])) + option], rel=1e-4, abs=1e-9
            )
    assert TRIED not in measured.tried.values()


def test_what_is_applied_is_cut_first_and_then_coded(measured: Measurement) -> None:
    model, problem = network(), formulate(measured, {"bytes": 1.0})
    choice = [len(options) - 1 for options in measured.transforms]
    smaller = qcompress.apply(model, measured, judge(problem, np.array(choice)))
    assert smaller.wide.weight.shape == (6, 4, 1, 1)
    assert smaller.each.groups == 6
    for layer in (smaller.stem, smaller.wide, smaller.back):
        assert max(len(row.unique()) for row in layer.weight.detach().flatten(1)) <= 2**3


def test_the_guard_runs_the_smaller_network(measured: Measurement) -> None:
    model, data, problem = network(), images(), formulate(measured, {"bytes": 1.0})
    seen = KeptLoss(model, measured, data)
    for choice in ([2, 4, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]):
        smaller = qcompress.apply(model, measured, judge(problem, np.array(choice)))
        found = seen(Proposal(name="", choice=np.array(choice)))
        assert found.mean == pytest.approx(mean_loss(model, smaller, data), rel=1e-5, abs=1e-9)


def test_layers_fitted_in_turn_are_coded_afterwards(measured: Measurement) -> None:
    model, data = network(), images()
    chosen = [options[-1] for options in measured.transforms]
    fitted = fitted_in_turn(model, measured, chosen, data)
    assert max(len(row.unique()) for row in fitted.back.weight.detach().flatten(1)) <= 2**3
    plain = qcompress.apply(
        model, measured, judge(formulate(measured, {"bytes": 1.0}), np.array([len(o) - 1 for o in measured.transforms]))
    )
    assert mean_loss(model, fitted, data) < mean_loss(model, plain, data)


def test_a_run_is_resumed_saved_and_loaded(tmp_path: Path) -> None:
    model, data = network(), images()
    given = {"budget": {"bytes": 0.2, "macs": 0.8}, "options": CHANNELS + CODES, "time_limit": 2}
    result = compress(model, data, **given, folder=tmp_path)  # type: ignore[arg-type]
    again = compress(model, data, **given, folder=tmp_path)  # type: ignore[arg-type]
    assert again.report.to_json() | {"wall_s": 0} == result.report.to_json() | {"wall_s": 0}
    assert qcompress.compressed_size(result.model).payload_bytes <= result.report.usage["bytes"] <= 0.2 * 3000
    saved = qcompress.save_compressed(result.model, tmp_path / "smaller.st")
    loaded = qcompress.load_compressed(saved.path, lambda: copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), result.model(data[0]))
    result.measurement.save(tmp_path / "measured.npz")
    read = Measurement.load(tmp_path / "measured.npz")
    assert read.coded == result.measurement.coded
    assert read.labels == result.measurement.labels


def test_many_layers_of_one_decision_share_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinning, "MAX_OPTIONS", 10)
    shared = measure(network(), images(), CHANNELS + CODES)
    alike = [
        item
        for item in shared.transforms[1]
        if not isinstance(item, Jointly) or len({code.label for code in item.codes}) == 1
    ]
    assert len(alike) == 3 * 3
    assert len(shared.transforms[1]) <= len(alike) + 10  # and the best at some prices


def test_sizes_without_a_form_are_not_on_offer() -> None:
    model, data = network(), images()
    sets = find_sets(model, data).sets
    part = next(part for part in measure(model, data, CODES).parts if part.name == "back")
    (layer,), _ = coded_layers(model, sets, [part])
    kept = {0: [8, 6, 4], 1: [12, 9, 6]}
    assert use_form("bytes", PruneQuantize(bits=8), layer, kept) is not None
    with pytest.raises(OptionsError, match="no codes on offer can be chosen together with channels"):
        measure(model, data, CHANNELS + prune_quantize(bits=(4,), group_size=5))
    with pytest.raises(OptionsError, match=r"with prune_quantize\(\) and low_rank\(\), found"):
        measure(model, data, CHANNELS + integer_products())


def test_a_layer_may_be_skipped_and_only_one_kind_offered_by_pattern() -> None:
    measurement = measure(network(), images(), {"wide": CHANNELS, "head": CODES}, loss="mse")
    assert [part.name for part in measurement.parts] == ["wide", "codes of head"]
    assert all(isinstance(item, (Keep, RemoveChannels)) for item in measurement.transforms[0])


def test_products_of_three_decisions_are_refused() -> None:
    with pytest.raises(ModelError, match="depends on 3 decisions together"):
        Tabulated([1, 1, 1]).add([(1.0, tuple((place, np.ones(1)) for place in range(3)))])


class WithMatrix(nn.Module):
    """A product with a plain parameter, and a stack of matrices, which has no codes beside channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 24), nn.Linear(24, 5)
        self.matrix, self.stack = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()) @ self.matrix @ self.stack.sum(0)


class WithCell(nn.Module):
    """A recurrent layer or PyTorch's attention between others."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.first, self.last = cell, nn.Linear(12, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None].repeat(1, 3, 1) * torch.linspace(0.5, 1.0, 3)[:, None]
        cell = self.cell(x, x, x) if isinstance(self.cell, nn.MultiheadAttention) else self.cell(x)
        return self.last(self.first(cell[0][:, -1]).relu())


class Pair(nn.Linear):
    """A layer that returns more than a tensor."""

    def forward(self, input: Tensor) -> tuple[Tensor, int]:  # type: ignore[override] # noqa: A002
        return super().forward(input), 0


class WithOddCalls(nn.Module):
    """A layer that returns a tuple, one that is called by keyword, and one whose weight alone is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pair, self.alone, self.last = (
            nn.Linear(12, 24),
            Pair(24, 20),
            nn.Linear(20, 9),
            nn.Linear(9, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.pair(self.first(x).relu())[0].relu()
        return self.last(input=nn.functional.linear(x, self.alone.weight).relu())


DIRECTLY: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "parameter": (WithMatrix, {"matrix"}),
    "recurrent": (lambda: WithCell(nn.LSTM(12, 12, batch_first=True)), {"cell.weight_ih_l0", "cell.weight_hh_l0"}),
    "attention": (
        lambda: WithCell(nn.MultiheadAttention(12, 3, batch_first=True)),
        {"cell.in_proj_weight", "cell.out_proj"},
    ),
    "odd calls": (WithOddCalls, {"pair", "alone"}),
}


@pytest.mark.parametrize("kind", DIRECTLY)
def test_codes_whose_layer_is_not_linear_in_them_are_evaluated_directly(kind: str) -> None:
    make, directly = DIRECTLY[kind]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model, data = make().eval(), [torch.randn(24, 12) for _ in range(2)]
    options = CHANNELS + prune_quantize(bits=(3, 6), sparsity=(0,))
    measured, tried = (measure(model, data, options, method=method) for method in ("fisher", "direct"))
    assert {name.removeprefix("codes of ") for name in measured.tried} >= directly
    assert measured.labels == tried.labels
    problem = formulate(measured, {"bytes": 1.0})
    for part, transforms in enumerate(measured.transforms):
        for option in range(1, len(transforms)):
            choice = np.zeros(problem.num_groups, dtype=np.int64)
            choice[part], flat = option, problem.group_offsets[part] + option
            assert measured.cost[flat] == pytest.approx(tried.cost[flat], rel=0.3)  # of other layers, linearised
            if isinstance(own := transforms[option], Jointly) and not isinstance(own.removal, Keep):
                continue  # a sum of several changes
            true = mean_loss(model, qcompress.apply(model, measured, judge(problem, choice)), data)
            layers = set(own.layers) if isinstance(own, Jointly) else {measured.parts[part].path}
            alike = 1e-4 if isinstance(own, RemoveChannels) or layers <= directly else 0.3
            assert measured.cost[flat] == pytest.approx(true, rel=alike, abs=1e-10)
    result = compress(model, data, budget={"macs": 0.98, "bytes": 0.4}, options=options, time_limit=2)
    assert result.report.usage["bytes"] == qcompress.compressed_size(result.model).payload_bytes


def test_the_bytes_of_what_has_no_codes_are_stated() -> None:
    model, data = WithMatrix(), [torch.randn(24, 12) for _ in range(2)]
    skipped = measure(model, data, CHANNELS + prune_quantize(bits=(4,), sparsity=(0,))).skipped
    assert {item.name: item.size_bytes for item in skipped} == {"stack[0:5]": 100, "stack[5:10]": 100}
