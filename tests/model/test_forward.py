"""Running a model: what a batch may be, and passes that depend on nothing but weights and batch."""

import copy
import random
from collections import UserDict
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import compress, mean_loss, measure, prune_quantize
from qcompress.errors import DataError, ModelError
from qcompress.model.forward import default_forward, evaluating, run
from qcompress.model.steady import Steady
from tests.measuring.methods.test_evidence import FINE, inputs, true_costs, words


class Two(nn.Module):
    """Two inputs, the second of which matters."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.tanh(self.left(left) + scale * self.right(right)))


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
def test_any_mapping_is_keyword_arguments(kind: type) -> None:
    model, batch = Two().eval(), {"left": inputs(8, 5), "right": inputs(8, 5, seed=2)}
    assert torch.equal(default_forward(model, kind(batch)), model(**batch))
    assert measure(model, [kind(batch)], FINE, loss="mse").num_samples == 8


def test_a_tuple_holds_all_the_inputs_that_the_model_needs_and_a_target_perhaps() -> None:
    model, left, right = Two().eval(), inputs(8, 5), inputs(8, 5, seed=2)
    for batch in ((left, right), [left, right, torch.zeros(8)]):
        assert torch.equal(default_forward(model, batch), model(left, right))
    for batch in ((left,), (left, right, 2.0, torch.zeros(8))):
        with pytest.raises(DataError, match=f"{len(batch)} entries.*needs 2 \\(left, right\\)"):
            default_forward(model, batch)
    with pytest.raises(DataError, match="3 entries.*needs 1"):
        default_forward(nn.Linear(5, 2), (left, right, left))


def test_entries_that_the_model_does_not_take_are_refused_by_name() -> None:
    batch = {"left": inputs(8, 5), "right": inputs(8, 5), "labels": torch.zeros(8)}
    with pytest.raises(DataError, match="labels.*accepts: left, right, scale"):
        default_forward(Two(), batch)


@pytest.mark.parametrize("outputs", [(8,), (8, 1), (8, 3, 1)])
def test_kl_of_what_is_no_distribution_is_refused_with_what_to_use(outputs: tuple[int, ...]) -> None:
    class Logit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, int(np.prod(outputs[1:])))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).reshape(outputs)

    model, data = Logit().eval(), [inputs(8, 5)]
    for method in ("fisher", "direct"):
        with pytest.raises(ModelError, match="loss='mse'.*make it two"):
            measure(model, data, FINE, method=method)
    assert measure(model, data, FINE, loss="mse").cost.max() > 0
    # the form that the error names is the divergence of yes-or-no distributions
    join = "stack" if len(outputs) == 1 else "cat"
    with pytest.raises(
        ModelError, match=rf"loss='kl:-1', forward=.*torch.{join}\(\[0 \* \(x := model\(batch\)\), x\], dim=-1\)"
    ):
        measure(model, data, FINE)
    measurement = measure(
        model,
        data,
        FINE,
        method="direct",
        loss="kl:-1",
        forward=lambda model, batch: getattr(torch, join)([0 * (x := model(batch)), x], -1),
    )
    changed = Logit().eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.fc.weight.copy_(measurement.transforms[0][1].approximate(next(iter(measurement.weights(model)))))
        p, q = torch.sigmoid(model(data[0]).double()), torch.sigmoid(changed(data[0]).double())
        true = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).reshape(8, -1).mean()
    assert measurement.cost[1] == pytest.approx(float(true), rel=1e-3)


class Masked(nn.Module):
    """Logits of which some are ruled out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(5, 6), nn.Linear(6, 30)

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.fc(torch.relu(self.first(x))).masked_fill(x[:, :1] > 0, 0).index_fill(1, torch.arange(9), -torch.inf)
        )


def test_classes_that_are_ruled_out_have_no_effect() -> None:
    class Left(nn.Module):
        def __init__(self, model: Masked) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)[:, 9:]

    torch.manual_seed(0)
    model, data = Masked().eval(), [inputs(32, 5)]
    found, expected = (measure(own, data, FINE, method="direct") for own in (model, Left(model).eval()))
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-6)  # sums over 30 numbers and over 21
    assert (measure(model, data, FINE).cost[1::2] > 0).all()
    with pytest.raises(ModelError, match="minus infinity"):
        measure(model, data, FINE, loss="mse")


class Stateful(nn.Module):
    """Counts its calls in a buffer that scales the output, draws noise, and keeps an average over batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("hidden", torch.ones(6), persistent=False)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.norm.train()
        x = self.norm(self.first(x))
        self.hidden = 0.9 * self.hidden + x.detach().mean(0)
        noise = torch.randn(6) + random.random() + float(np.random.rand())  # noqa: NPY002, S311
        return self.head(torch.tanh(x) + self.hidden + 0.1 * noise) * (1 + self.calls / 10)


def test_state_and_random_numbers_are_the_same_in_every_pass_and_put_back() -> None:
    torch.manual_seed(0)
    model, data = Stateful().eval(), [inputs(16, 5), inputs(16, 5, seed=2)]
    before = {name: own.clone() for name, own in (*model.named_buffers(), *model.named_parameters())}
    for method in ("direct", "fisher"):
        torch_state, state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        measurement = measure(model, data, FINE, method=method, loss="mse")
        assert torch.equal(torch_state, torch.get_rng_state())
        assert state == random.getstate()
        assert np.array_equal(numpy_state[1], np.random.get_state()[1])  # noqa: NPY002
        after = dict((*model.named_buffers(), *model.named_parameters()))
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert any(note.startswith("calls changes while the model runs") for note in measurement.notes)
        assert sum("changes while the model runs" in note for note in measurement.notes) >= 3
        # one pass with the same noise, from the same buffers, is the truth: both batches start from them
        changed = Stateful().eval()
        for index, part in enumerate(measurement.parts):
            changed.load_state_dict(model.state_dict())
            weight = list(measurement.weights(model))[index]
            with torch.no_grad():
                changed.get_submodule(part.name).weight.copy_(measurement.transforms[index][1].approximate(weight))
            true = mean_loss(model, changed, data, loss="mse")
            assert true > 0
            assert measurement.cost[2 * index + 1] == pytest.approx(true, rel=0.1)


def test_an_embedding_that_limits_its_weight_stays_as_it_is() -> None:
    class Limited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6, max_norm=0.5), nn.Linear(6, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids)).mean(1)

    model = Limited().eval()
    before = model.embed.weight.detach().clone()
    data = [words(11, 8, 3), words(11, 8, 3, seed=4)]
    for method in ("direct", "fisher"):
        measurement = measure(model, data, FINE, method=method, loss="mse")
        assert torch.equal(model.embed.weight, before)
        np.testing.assert_allclose(measurement.cost, true_costs(copy.deepcopy(model), data, measurement), rtol=0.1)
    assert torch.equal(model.embed.weight, before)
    assert any(note.startswith("embed.weight changes") for note in measurement.notes)
    result = compress(model, [words(11, 8, 3)], budget={"bytes": 0.9}, options=FINE, loss="mse")
    assert result.report.usage["bytes"] <= result.report.budgets["bytes"]


def test_state_that_cannot_be_put_back_is_refused() -> None:
    calls = [0]

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            calls[0] += 1
            return super().forward(x) * calls[0]

    class Moving(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            with torch.no_grad():
                self.weight += 1e-3
            return super().forward(x)

    for method in ("fisher", "direct"):
        with pytest.raises(ModelError, match="another output when the same batch is run again"):
            measure(Counting(5, 3), [inputs(8, 5)], FINE, method=method)
        with pytest.raises(ModelError, match="changed its parameters weight"):
            measure(Moving(5, 3), [inputs(8, 5)], FINE, method=method)


def test_sparse_buffers_are_left_alone_by_passes_and_refused_by_name_where_bytes_count() -> None:
    class Sparse(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 3)
            self.register_buffer("graph", torch.eye(8).to_sparse())

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(self.graph @ x)

    model, data = Sparse().eval(), [inputs(8, 5)]
    steady = Steady()
    run(model, data[0], steady)
    assert not steady.moved
    with pytest.raises(ModelError, match="'graph' is a sparse tensor"):
        measure(model, data, FINE)


def test_a_used_up_iterator_is_called_that() -> None:
    class Once:
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter([inputs(8, 5)])

        def __iter__(self) -> Iterator[Any]:
            return self.batches

    model = nn.Linear(5, 3)
    with pytest.raises(DataError, match="more than once"):
        measure(model, Once(), FINE)
    used = iter([inputs(8, 5)])
    list(used)
    with pytest.raises(DataError, match="already exhausted"):
        mean_loss(model, model, used)


def test_data_of_another_length_in_another_pass_is_refused() -> None:
    class Shrinking:
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            yield from [inputs(8, 5)] * max(4 - self.passes, 1)

    with pytest.raises(DataError, match="2 batches in one pass and 1 in another"):
        measure(nn.Linear(5, 3), Shrinking(), prune_quantize(bits=(4,), sparsity=(0,)))


@pytest.mark.parametrize(("weights", "inputs_dtype"), [("float16", "float32"), ("float32", "float64")])
def test_batches_of_another_dtype_than_the_weights_are_named(weights: str, inputs_dtype: str) -> None:
    model = nn.Linear(3, 2).to(getattr(torch, weights))
    batch = torch.ones(4, 3, dtype=getattr(torch, inputs_dtype))
    with pytest.raises(
        DataError, match=f"a batch of {inputs_dtype}, because its weights are {weights}: convert the batches"
    ):
        measure(model, [batch], prune_quantize(bits=(4,)))


def test_recurrent_layers_run_without_cudnn_which_has_no_gradients_in_evaluation_mode() -> None:
    seen = {}
    for name, model in {"recurrent": nn.Sequential(nn.LSTM(2, 2)), "plain": nn.Linear(2, 2)}.items():
        with evaluating(model):
            seen[name] = torch.backends.cudnn.enabled
    assert seen == {"recurrent": False, "plain": torch.backends.cudnn.enabled}
    assert torch.backends.cudnn.enabled
