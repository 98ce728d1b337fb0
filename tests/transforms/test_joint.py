"""Rank, sparsity and bits as one choice: measured, solved for, saved, and applied exactly as measured."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import Measurement, apply, formulate, load_compressed, low_rank, measure, prune_quantize, save_compressed
from qcompress import solve as solve_problem
from qcompress.compressed.factored import Factored
from qcompress.errors import DataError, OptionsError
from qcompress.measuring.inputs.moments import second_moments
from qcompress.model.parts import survey
from qcompress.options import Options
from tests.measurements import Chain, Mixed, solution
from tests.transforms.test_low_rank import CONVS

ALL_KINDS = ("channels", "spatial", "tucker", "sliced")
CODES = prune_quantize(bits=(3, 4, 8), sparsity=(0, 0.5))


def ranks(*, whitened: bool = False) -> Options:
    return low_rank(ratios=(0.3, 0.6), kinds=ALL_KINDS, slices=(2,), whitened=whitened)


JOINT = CODES + ranks(whitened=True) + ranks(whitened=True).then(CODES)


def network() -> nn.Module:
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU()
    return Chain(*convs, nn.Flatten(), nn.Linear(16 * 9, 20), nn.ReLU(), nn.Linear(20, 4)).eval()


def batches(*shape: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


DATA = batches(16, 3, 6, 6)


@pytest.fixture(scope="module")
def joint() -> Measurement:
    return measure(network(), DATA, JOINT)


# ---- moments ----


@pytest.mark.parametrize("name", CONVS)
def test_moments_are_those_of_what_a_kernel_sees(name: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, **CONVS[name]).double()  # type: ignore[arg-type]
    model, data = Chain(conv).double(), [batch.double() for batch in batches(3, 8, 9, 11)]
    parts = survey(model, data).parts
    (moments,) = second_moments(model, parts, data, None)[0].values()
    conv.bias = None
    outputs = torch.cat([model(batch).detach() for batch in data]).transpose(0, 1).flatten(1)
    rows = conv.weight.detach().flatten(1)
    expected = outputs @ outputs.T / outputs.shape[1]
    torch.testing.assert_close(rows @ moments.double() @ rows.T, expected, rtol=1e-5, atol=1e-7)


def test_moments_of_a_linear_layer_count_every_token_and_every_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(input=torch.tanh(self.fc(x)))

    model, data = Twice().bfloat16(), [batch.bfloat16() for batch in batches(2, 5, 4)]
    (moments,) = second_moments(model, survey(model, data).parts, data, None)[0].values()
    seen = torch.cat([torch.cat([x, torch.tanh(model.fc(x))]) for x in data]).detach().float().flatten(0, -2)
    torch.testing.assert_close(moments, seen.T @ seen / len(seen))


def test_moments_are_collected_only_for_layers_that_a_whitened_option_may_fit(joint: Measurement) -> None:
    assert list(joint.moments) == [part.name for part in joint.parts]
    assert joint.moments["layers.5"].shape == (144, 144)
    assert not measure(network(), DATA, CODES + ranks()).moments
    mixed = measure(Mixed().eval(), DATA, ranks(whitened=True))
    assert list(mixed.moments) == ["stem", "wide", "fc"]
    blocks = measure(network(), DATA, CODES + ranks(whitened=True), granularity=5)
    assert list(blocks.moments) == ["layers.7"]  # of four outputs: its only block is the layer


def test_inputs_that_are_not_finite_are_named() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nan_to_num(self.fc(x / 0))

    with pytest.raises(DataError, match="the inputs of 'fc' are not finite"):
        measure(Masked(), batches(2, 8), ranks(whitened=True))


# ---- measuring ----


@pytest.mark.parametrize("method", ["fisher", "direct"])
def test_the_error_of_a_layer_alone_is_its_measured_cost(method: str) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(24, 12, bias=False)).eval()
    x = torch.randn(64, 24) * torch.logspace(0, -2, 24)
    measurement = measure(model, [x], JOINT, method=method, loss="mse")
    size = float(model(x).detach().square().mean())  # "mse" is the mean over outputs
    np.testing.assert_allclose(measurement.cost, measurement.error * size, rtol=1e-3, atol=1e-9)
    assert len(measurement.cost) > 8


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_kind_costs_the_same_by_both_methods_in_a_linear_network(kind: str) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, (3, 2), stride=2)).eval()
    options = low_rank(ratios=(0.4,), kinds=(kind,), slices=(2,), whitened=False)
    fisher, direct = (
        measure(model, batches(8, 4, 4, 4), options + options.then(CODES), method=method, loss="mse")
        for method in ("fisher", "direct")
    )
    assert len(fisher.cost) > 8
    np.testing.assert_allclose(fisher.cost, direct.cost, rtol=1e-3, atol=1e-8)


def test_joint_options_are_some_dozens_of_which_none_beats_another(joint: Measurement) -> None:
    for part, own in zip(joint.parts, joint.transforms, strict=True):
        assert len(own) <= 60, part.name
        assert len({transform.label for transform in own}) == len(own)
    start, stop = 1, len(joint.transforms[0])
    kinds = [transform.kind for transform in joint.transforms[0]]
    figures = np.stack([joint.resources["bytes"], joint.resources["macs"], joint.error], axis=1)[:stop]
    for one in range(start, stop):
        for other in range(start, stop):
            if one != other and kinds[one] == kinds[other]:
                assert (figures[one] > figures[other]).any()


def test_measuring_again_gives_the_same_and_a_cut_run_goes_on(joint: Measurement, tmp_path: Path) -> None:
    class Cut(Exception):  # noqa: N818
        pass

    class Data(list[Tensor]):
        def __iter__(self):  # type: ignore[no-untyped-def]
            for index, batch in enumerate(list.__iter__(self)):
                if index == 2 and cache.exists():  # two batches are measured
                    raise Cut
                yield batch

    data, cache = Data(DATA), tmp_path / "sums"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompress.measuring.accumulation.SAVE_EVERY_S", -1.0)
        with pytest.raises(Cut):
            measure(network(), data, JOINT, cache=cache)
        assert cache.exists()
        again = measure(network(), DATA, JOINT, cache=cache)
    np.testing.assert_array_equal(again.cost, joint.cost)
    np.testing.assert_array_equal(again.error, joint.error)
    assert again.transforms == joint.transforms


# ---- applying ----


def test_what_is_applied_after_loading_is_what_was_measured_and_takes_what_was_predicted(
    joint: Measurement, tmp_path: Path
) -> None:
    model = network()
    joint.save(tmp_path / "measurement.npz")
    loaded = Measurement.load(tmp_path / "measurement.npz")
    assert all(np.array_equal(loaded.moments[name], own) for name, own in joint.moments.items())
    np.testing.assert_array_equal(loaded.error, joint.error)
    assert loaded.transforms == joint.transforms
    starts = np.cumsum([0, *map(len, joint.transforms)])
    for turn in range(max(map(len, joint.transforms))):
        choice = [turn % len(own) for own in joint.transforms]
        smaller = apply(model, loaded, solution(choice))
        saved = save_compressed(smaller, tmp_path / "model")
        used = joint.resources["bytes"][starts[:-1] + choice].sum()
        assert saved.payload_bytes == joint.fixed["bytes"] + used
        again = load_compressed(saved.path, network)
        assert {name: value.tolist() for name, value in again.state_dict().items()} == {
            name: value.tolist() for name, value in smaller.state_dict().items()
        }
        weights = joint.weights(model)
        for part, weight, own, option in zip(joint.parts, weights, joint.transforms, choice, strict=True):
            expected = own[option].approximate(weight)
            module = smaller.get_submodule(part.name)
            dense = module.to_dense() if isinstance(module, Factored) else module
            assert torch.equal(dense.weight.flatten(1), expected)  # type: ignore[union-attr, operator]
            assert weight.relative_error(expected) == joint.error[starts[joint.parts.index(part)] + option]


def test_a_measurement_without_its_moments_is_not_applied(joint: Measurement) -> None:
    bare = replace(joint, moments=MappingProxyType({}), codes={})
    option = next(i for i, own in enumerate(joint.transforms[0]) if own.kind == "low_rank")
    with pytest.raises(OptionsError, match="needs the second moments"):
        apply(network(), bare, solution([option, 0, 0, 0]))


def test_one_solve_of_all_is_never_worse_than_the_best_family(joint: Measurement) -> None:
    kinds = np.array([transform.kind for own in joint.transforms for transform in own])
    for budget in (0.08, 0.15):
        problem = formulate(joint, {"bytes": budget}, pairs=False)
        found = solve_problem(problem, "lagrangian").objective
        for family in ("prune_quantize", "low_rank"):
            cost = np.where((kinds == "keep") | (kinds == family), problem.cost, problem.cost + 1e6)
            alone = problem.derived(cost=cost)
            best = solve_problem(alone, "lagrangian").objective
            assert found is not None
            assert best is not None
            assert found <= best * (1 + 1e-9)


def test_macs_and_bytes_can_be_asked_for_together(joint: Measurement) -> None:
    model = network()
    found = solve_problem(formulate(joint, {"bytes": 0.12, "macs": 0.5}), "auto", time_limit=5)
    assert found.feasible
    smaller = apply(model, joint, found)
    assert any(isinstance(module, Factored) for module in smaller.modules())
    macs = survey(smaller, DATA).original["macs"]
    assert macs == pytest.approx(found.usage["macs"])
    assert macs <= 0.5 * joint.original["macs"]
