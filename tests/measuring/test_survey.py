"""What is measured of which layer: all batches, layers without input, chosen layers, whole macs, shared moments."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import Measurement, apply, formulate, low_rank, measure, prune_quantize, solve
from qcompress.errors import OptionsError
from qcompress.measuring.candidates import EncodeProgress
from qcompress.measuring.inputs import moments as moments_of
from qcompress.measuring.inputs.moments import input_rows, second_moments
from qcompress.measuring.kept_codes import KeptCodes
from qcompress.model.parts import survey
from qcompress.options import Options
from qcompress.transforms.base import Target, Weight
from tests.measuring.methods.test_evidence import FINE, assert_true, inputs, words

COMPENSATED = prune_quantize(bits=(3,), sparsity=(0,), compensated=True)


class Experts(nn.Module):
    """Tokens go to the expert that their first number names; nothing ever goes to the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.unused, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = (x[:, 0].long() == index).nonzero().flatten()
            out = out.index_add(0, chosen, expert(x[chosen]))
        return self.head(torch.tanh(out))


def to_expert(number: int, seed: int) -> Tensor:
    batch = inputs(8, 6, seed=seed)
    batch[:, 0] = number
    return batch


def test_an_expert_first_used_in_the_second_batch_is_measured_and_an_idle_one_kept_and_named() -> None:
    torch.manual_seed(0)
    measurement = assert_true(Experts().eval(), [to_expert(0, 1), to_expert(1, 2)])
    assert [part.name for part in measurement.parts] == ["experts.0", "experts.1", "head"]
    assert {item.name for item in measurement.skipped} == {"experts.2", "unused"}
    assert all("no calibration input" in item.reason for item in measurement.skipped)
    assert (measurement.cost.reshape(3, 2)[:, 1] > 0).all()


def test_a_layer_whose_weight_is_used_without_calling_it_is_a_part_by_trying() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias))
            return self.head(hidden)

    torch.manual_seed(0)
    measurement = assert_true(Called().eval(), [inputs(16, 6)])
    assert dict(measurement.tried) == {"first": "its weight is used without calling the layer"}


def test_pytorchs_attention_is_measured_whole() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    measurement = assert_true(model, [inputs(64, 5, 8)], rtol=0.25)  # by 8 probes of each sample's 40 numbers
    names = [part.name for part in measurement.parts]
    assert {"self_attn.out_proj", "linear1", "linear2"} <= set(names)
    # projections 5·8·24 and 5·8·8, scores and values 2·5·5·8, the two layers 2·5·8·16
    assert measurement.original["macs"] == 5 * 8 * 24 + 5 * 8 * 8 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16


RECURRENT: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "LSTM": (lambda: nn.LSTM(6, 5, batch_first=True), 4),
    "GRU": (lambda: nn.GRU(6, 5, batch_first=True), 3),
    "RNN": (lambda: nn.RNN(6, 5, batch_first=True), 1),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_macs_are_of_the_whole_model_also_where_layers_are_no_parts(kind: str) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = RECURRENT[kind][0](), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cells(x)[0])

    found = survey(Tagger().eval(), [inputs(3, 7, 6)])
    gates = RECURRENT[kind][1]
    assert found.original["macs"] == 7 * (gates * 5 * (6 + 5) + 5 * 4)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


def labels(measurement: Measurement) -> dict[str, tuple[str, ...]]:
    return {part.name: own[1:] for part, own in zip(measurement.parts, measurement.labels, strict=True)}


def test_layers_are_chosen_by_patterns_and_have_options_of_their_own() -> None:
    torch.manual_seed(0)
    model, data = Nested().eval(), [inputs(16, 6)]
    two, eight = prune_quantize(bits=(2,), sparsity=(0,)), FINE
    found = measure(model, data, {"head": eight, "blocks.*": two + eight, "*": two}, skip="blocks.1")
    assert labels(found) == {
        "stem": ("2 bits",),
        "blocks.0": ("2 bits", "8 bits"),
        "blocks.2": ("2 bits", "8 bits"),
        "head": ("8 bits",),
    }
    assert [(item.name, item.reason) for item in found.skipped] == [("blocks.1", "left out by skip='blocks.1'")]
    assert set(labels(measure(model, data, two, only=("blocks.*", "head")))) == {
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "head",
    }
    assert set(labels(measure(model, data, {"stem": two}))) == {"stem"}
    for wrong in ({"skip": "block.*"}, {"only": ("heads",)}):
        with pytest.raises(
            OptionsError, match=r"no layer has a name like '(block\.\*|heads)'; there are: stem, blocks.0"
        ):
            measure(model, data, two, **wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="no layer has a name like 'heads'"):
        measure(model, data, {"heads": two, "*": two})
    with pytest.raises(OptionsError, match="mapping from patterns"):
        measure(model, data, {"head": 8})  # type: ignore[dict-item]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT
        return self.o(scores.softmax(-1) @ self.v(x))


def test_layers_with_the_same_input_share_one_matrix_of_moments(tmp_path: object) -> None:
    torch.manual_seed(0)
    model, data = Attention().eval(), [inputs(8, 5, 6), inputs(8, 5, 6, seed=2)]
    measurement = measure(model, data, COMPENSATED, loss="mse")
    assert measurement.moments["q"] is measurement.moments["k"] is measurement.moments["v"]
    assert measurement.moments["q"] is not measurement.moments["o"]
    rows = torch.cat(data).flatten(0, 1)
    np.testing.assert_allclose(measurement.moments["v"], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    measurement.save(f"{tmp_path}/m.npz")
    loaded = Measurement.load(f"{tmp_path}/m.npz")
    assert loaded.moments["q"] is loaded.moments["v"]
    for name, own in measurement.moments.items():
        np.testing.assert_array_equal(loaded.moments[name], own)


def test_layers_that_have_the_same_input_at_first_only_have_moments_of_their_own() -> None:
    class Parting(Attention):
        def forward(self, x: Tensor) -> Tensor:
            other = x * 2 if float(x[0, 0, 0]) > 5 else x
            return self.o(self.q(x) + self.k(other) + self.v(x))

    torch.manual_seed(0)
    later = inputs(8, 5, 6, seed=2)
    later[0, 0, 0] = 6
    model, data = Parting().eval(), [inputs(8, 5, 6), later]
    parts = survey(model, data).parts
    found, counts = second_moments(model, parts, data, None)
    rows = torch.cat(data).flatten(0, 1)
    doubled = torch.cat([data[0], 2 * data[1]]).flatten(0, 1)
    torch.testing.assert_close(found["v"], rows.T @ rows / 80)
    torch.testing.assert_close(found["k"], doubled.T @ doubled / 80)
    assert counts == dict.fromkeys("qkvo", 80)


class SamePadding(nn.Conv2d):
    """Pads by itself, as convolutions taken over from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(
            nn.functional.pad(x, (0, 2, 1, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class Plain(nn.Conv2d):
    """Only another name."""


@pytest.mark.parametrize("kind", [SamePadding, Plain, nn.Conv2d])
@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_subclasses_of_layers_are_compensated_by_what_their_weight_is_multiplied_with(
    kind: type[nn.Conv2d], padding: int | str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(2, 5, 3, padding=padding), nn.Flatten(), nn.LazyLinear(4)).eval()
    data = [inputs(64, 2, 1, 1) + 0.1 * inputs(64, 2, 4, 4, seed=2)]  # neighbours go together: errors can cancel
    model(data[0])
    compensated, nearest = (
        measure(model, data, prune_quantize(bits=(3,), sparsity=(0,), compensated=own), loss="mse", only="0")
        for own in (True, False)
    )
    assert compensated.labels[0][1] == "3 bits, compensated"
    assert compensated.cost[1] < 0.8 * nearest.cost[1]
    rows = torch.cat(list(input_rows(model[0], data[0])))
    expected = model[0](data[0]).movedim(1, -1).reshape(-1, 5)
    torch.testing.assert_close(rows @ model[0].weight.flatten(1).T + model[0].bias, expected)


def test_a_layer_whose_product_is_not_with_its_weight_is_not_compensated() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Standardised(2, 5, 2), nn.Flatten(), nn.Linear(45, 4)).eval()
    measurement = assert_true(model, [inputs(32, 2, 4, 4)])
    assert not measurement.parts[0].target.common_input


def test_layers_with_too_many_inputs_have_moments_in_blocks_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    for name, value in (("MAX_INPUTS", 20), ("BLOCK_INPUTS", 16), ("STEP", 4)):
        monkeypatch.setattr(f"qcompress.transforms.column_blocks.{name}", value)
    options = COMPENSATED + low_rank(ratios=(0.5,), whitened=True)
    data = [inputs(64, 40)]
    measurement = measure(model, data, options, loss="mse")
    moments = measurement.moments["0"]
    whole = data[0].T @ data[0] / 64
    assert moments.shape == (3, 16, 16)
    for place in range(3):
        own = whole[16 * place : 16 * place + 16, 16 * place : 16 * place + 16]
        np.testing.assert_allclose(moments[place][: len(own), : len(own)], own, rtol=1e-5, atol=1e-6)
    assert not moments[2][8:].any()
    assert measurement.labels[0][1] == "3 bits, compensated"
    assert "whitened" in measurement.labels[0][2]
    (note,) = measurement.notes
    assert note.startswith("0: inputs count as independent where 16 columns or more apart, a channel has 40 weights")
    assert moments_of.forecast_bytes(measurement.parts)["0"] == 12 * 3 * 16**2


def test_options_that_take_all_inputs_of_a_wide_layer_go_without_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    monkeypatch.setattr("qcompress.transforms.column_blocks.MAX_INPUTS", 20)
    in_groups = prune_quantize(bits=(4,), sparsity=(0,), group_size=10, compensated=True)
    measurement = measure(model, [inputs(64, 40)], in_groups, loss="mse")
    assert list(measurement.moments) == ["2"]
    assert "compensated" not in measurement.labels[0][1]
    (note,) = measurement.notes
    assert note.startswith("0: no compensation and no whitening of options that take all inputs")


def test_moments_that_do_not_fit_in_memory_are_refused_before_anything_long_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    monkeypatch.setattr("qcompress.measuring.memory.available_bytes", lambda: 19_000)
    monkeypatch.setattr("qcompress.measuring.measure.second_moments", lambda *_: pytest.fail("collected"))
    with pytest.raises(OptionsError, match="2e-05 GB here, but 1.9e-05 GB are free; the largest are those of '0'"):
        measure(model, [inputs(64, 40)], COMPENSATED)
    assert moments_of.forecast_bytes(survey(model, [inputs(64, 40)]).parts) == {"0": 12 * 1600, "2": 12 * 64}


def test_codes_are_worked_out_once_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = Nested().eval(), [inputs(16, 6)]
    seen = []
    measurement = measure(model, data, FINE, on_encode=seen.append)
    assert [progress.part for progress in seen] == [part.name for part in measurement.parts]
    assert [progress.parts for progress in seen] == [1, 2, 3, 4, 5]
    assert seen[-1].remaining_s == 0
    assert seen[0].remaining_s is None
    assert seen[-1].size_bytes == sum(
        measurement.resources["bytes"][2 * index + 1] for index in range(len(measurement.parts))
    )
    kind = type(measurement.transforms[0][1])
    solution = solve(formulate(measurement, {"bytes": 0.5}), "brute-force")
    expected = apply(model, dataclasses.replace(measurement, codes={}), solution)
    monkeypatch.setattr(kind, "encode", lambda *_: pytest.fail("encoded again"))
    again = apply(model, measurement, solution)
    assert all(torch.equal(own, other) for own, other in zip(again.parameters(), expected.parameters(), strict=True))


def test_a_measurement_cut_while_codes_are_worked_out_goes_on_with_the_next_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CutError(Exception):
        pass

    def cut_at(number: int) -> Callable[[EncodeProgress], None]:
        def tell(progress: EncodeProgress) -> None:
            if progress.parts == number:
                raise CutError

        return tell

    torch.manual_seed(0)
    model, data = Nested().eval().bfloat16(), [inputs(16, 6).bfloat16()]
    options = COMPENSATED + prune_quantize(bits=(3,), sparsity=(0.5,), group_size=2)
    whole, cache = measure(model, data, options), tmp_path / "sums.npz"
    for number in (2, 4):
        with pytest.raises(CutError):
            measure(model, data, options, cache=cache, on_encode=cut_at(number))
    worked_out = []
    find = Options.for_weight
    monkeypatch.setattr(Options, "for_weight", lambda own, weight: worked_out.append(weight) or find(own, weight))
    again = measure(model, data, options, cache=cache)
    assert len(worked_out) == len(whole.parts) - 4
    assert again.transforms == whole.transforms
    assert np.array_equal(again.cost, whole.cost)
    assert np.array_equal(again.error, whole.error)
    for place, stored in whole.codes.items():
        assert all(torch.equal(values, again.codes[place][name]) for name, values in stored.items())
        assert {name: own.dtype for name, own in stored.items()} == {
            name: own.dtype for name, own in again.codes[place].items()
        }
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["options", "inputs", "weight", "damage"])
def test_codes_of_something_else_are_not_taken_again(change: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 6)
    target = Target(layer="Linear", channels=4, per_channel=6, dtype=torch.float32, macs=24.0)
    kept, kinds = KeptCodes(tmp_path, ""), prune_quantize(bits=(3,), sparsity=(0,), compensated=True)
    first = Weight(weight, target, torch.eye(6), 10)
    kept.once(0, kinds, first, lambda: kinds.for_weight(first))
    asked, offered = first, kinds
    if change == "options":
        offered = prune_quantize(bits=(4,), sparsity=(0,), compensated=True)
    elif change == "inputs":
        asked = Weight(weight, target, 2 * torch.eye(6), 10)
    elif change == "weight":
        asked = Weight(weight + 1e-3, target, torch.eye(6), 10)
    else:
        (tmp_path / "0.npz").write_bytes((tmp_path / "0.npz").read_bytes()[:200])
    made = []
    kept.once(0, offered, asked, lambda: made.append(1) or offered.for_weight(asked))
    assert made


def test_an_embedding_shared_with_a_head_that_is_never_called_is_measured() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.embed(ids).mean(1), self.head.weight)

    torch.manual_seed(0)
    measurement = assert_true(Tied().eval(), [words(11, 32, 3)])
    assert [part.modules for part in measurement.parts] == [("embed", "head")]
    assert set(measurement.tried) == {"embed"}
