"""Copies that are compressed are their own: nothing of the original is shared, read or written."""

import copy
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress.compressed.apply import apply
from qcompress.compressed.copying import own_copy
from qcompress.compressed.factored import DenseWeight, FactoredLinear, factored
from qcompress.errors import ModelError
from qcompress.model.tensors import held_tensors
from qcompress.options import prune_quantize
from tests.measurements import measured, solution

OPTIONS = prune_quantize(bits=(4,), sparsity=(0,))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)).eval()


def with_closed_forward(model: nn.Sequential) -> None:
    old = model.forward
    model.forward = lambda x: 2 * old(x)  # type: ignore[method-assign]


def with_closed_inner_forward(model: nn.Sequential) -> None:
    old = model[2].forward
    model[2].forward = lambda x: 2 * old(x)  # type: ignore[method-assign]


def with_closed_weight(model: nn.Sequential) -> None:
    weight = model[2].weight.detach().t()
    model[2].forward = lambda x: x @ weight  # type: ignore[method-assign]


def with_default_argument(model: nn.Sequential) -> None:
    def forward(x: Tensor, layer: nn.Module = model[0]) -> Tensor:
        return layer.weight.sum() + x  # type: ignore[operator]

    model[1].forward = forward  # type: ignore[method-assign]


def with_wrapped_forward(model: nn.Sequential) -> None:
    old = model[0].forward

    @functools.wraps(old)
    def forward(*given: Any) -> Tensor:
        return 3 * old(*given)

    model[0].forward = forward  # type: ignore[method-assign]


def with_hook(model: nn.Sequential) -> None:
    first = model[0]
    model[2].register_forward_hook(lambda module, given, output: output + first.weight.sum())


class Itself(nn.Linear):
    """Says that a copy of it is itself, as some wrappers of frozen networks do."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Itself":
        return self


def with_a_module_that_is_not_copied(model: nn.Sequential) -> None:
    model[2] = Itself(8, 6)


ALIASES = [
    with_closed_forward,
    with_closed_inner_forward,
    with_closed_weight,
    with_default_argument,
    with_wrapped_forward,
    with_hook,
    with_a_module_that_is_not_copied,
]


@pytest.mark.parametrize("with_batch", [False, True])
@pytest.mark.parametrize("change", ALIASES)
def test_a_copy_that_would_run_the_original_is_refused(
    change: Callable[[nn.Sequential], None], with_batch: bool
) -> None:
    model = network()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"goes on using the original.*apply_\(model"):
        own_copy(model, torch.randn(3, 6) if with_batch else None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_applying_to_such_a_model_is_refused_and_in_place_works() -> None:
    model = network()
    measurement = measured(model, torch.randn(3, 6), OPTIONS)
    with_closed_inner_forward(model)
    with pytest.raises(ModelError, match=r"'2\.forward' holds on to the original's Linear"):
        apply(model, measurement, solution([1, 1]))


def bound_method(model: nn.Sequential) -> None:
    model.forward = model.forward  # type: ignore[method-assign]


def partial_of_module(model: nn.Sequential) -> None:
    model[2].forward = functools.partial(type(model[2]).forward, model[2])  # type: ignore[method-assign]


def hook_that_counts(model: nn.Sequential) -> None:
    calls: list[int] = []
    model[0].register_forward_hook(lambda module, given, output: calls.append(len(output)))


@pytest.mark.parametrize("with_batch", [False, True])
@pytest.mark.parametrize("change", [bound_method, partial_of_module, hook_that_counts, lambda model: None])
def test_a_copy_runs_on_its_own_weights(change: Callable[[nn.Sequential], None], with_batch: bool) -> None:
    model, batch = network(), torch.randn(3, 6)
    change(model)
    copied = own_copy(model, batch if with_batch else None)
    expected = model(batch)
    assert torch.equal(copied(batch), expected)
    for held in held_tensors(copied):
        before = copied(batch)
        with torch.no_grad():
            held.tensor.add_(1.0)
        assert not torch.equal(copied(batch), before), held.name
    assert torch.equal(model(batch), expected)


def test_a_forward_that_ignores_the_model_it_is_given_is_refused() -> None:
    model, batch = network(), torch.randn(3, 6)
    with pytest.raises(ModelError, match=r"reads the original's '0\.(weight|bias)'.*the given forward="):
        own_copy(model, batch, lambda given, batch: model(batch))
    own_copy(model, batch, lambda given, batch: given(batch))


def test_looking_at_a_copy_leaves_state_and_random_numbers_alone() -> None:
    class Counting(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.fc(x) + torch.rand(3)

    model = Counting().train()
    state = torch.random.get_rng_state()
    copied = own_copy(model, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (float(model.calls), float(copied.calls)) == (0, 0)
    assert copied.training
    assert all(parameter.requires_grad for parameter in copied.parameters())


def lock(model: nn.Sequential, folder: Path) -> None:
    model[0].guard = threading.Lock()  # type: ignore[assignment]


def open_file(model: nn.Sequential, folder: Path) -> None:
    model[0].guard = (folder / "log").open("w")  # type: ignore[assignment]


def generator(model: nn.Sequential, folder: Path) -> None:
    model[0].guard = (x for x in [1])  # type: ignore[assignment]


@pytest.mark.parametrize("hold", [lock, open_file, generator])
def test_what_cannot_be_copied_is_named_with_the_way_out(
    hold: Callable[[nn.Sequential, Path], None], tmp_path: Path
) -> None:
    model = network()
    hold(model, tmp_path)
    with pytest.raises(ModelError, match=r"cannot be copied: its attribute '0\.guard' \(.*\) refuses.*apply_\(model"):
        own_copy(model)
    if hold is open_file:
        model[0].guard.close()


def test_what_is_computed_from_the_weight_of_a_factored_layer_is_a_plain_tensor() -> None:
    layer = factored(nn.Linear(4, 4), {"reduce": torch.randn(2, 4), "expand": torch.randn(4, 2)})
    assert isinstance(layer, FactoredLinear)
    weight, x = layer.weight, torch.randn(3, 4)
    assert type(weight) is DenseWeight
    results = [x @ weight.T, weight + 1, 2 * weight, weight[0], weight.sum(), nn.functional.linear(x, weight)]
    results += [weight.view(-1), weight.clone(), weight.detach(), torch.cat([weight, weight]), weight.chunk(2)[0]]
    assert {type(result) for result in results} == {Tensor}
    torch.testing.assert_close(results[0] + layer.bias, layer(x))


class Compiled(nn.Module):
    """An inner block that is compiled, under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.compile(nn.Linear(6, 6), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).float()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's of scripting
@pytest.mark.parametrize(
    "make",
    [
        Compiled,
        lambda: nn.Sequential(torch.jit.script(nn.Linear(6, 6)), nn.Linear(6, 6)),
        lambda: nn.Sequential(torch.jit.trace(nn.Linear(6, 6), torch.zeros(1, 6)), nn.Linear(6, 6)),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
        lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
    ],
)
def test_layers_that_run_in_their_own_way_are_copied(make: Callable[[], nn.Module]) -> None:
    model, batch = make().eval(), torch.randn(3, 6)
    for copied in (own_copy(model), own_copy(model, batch)):
        assert torch.equal(copied(batch), model(batch))
        assert all(parameter.is_leaf and parameter.requires_grad for parameter in copied.parameters())
