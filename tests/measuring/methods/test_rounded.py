"""What a network rounds is found by its operations, also beside a path that is not rounded."""

import tempfile
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qcompress
from qcompress.errors import ModelError
from qcompress.measuring.methods.gradient_check import misleading
from qcompress.measuring.methods.rounded import rounded
from tests.models import seeded

GRID = torch.linspace(-2, 2, 65)
OPTIONS = qcompress.prune_quantize(bits=(3, 5), sparsity=(0,))


def by_largest(y: Tensor) -> Tensor:
    scale = float(y.detach().abs().max()) / 127
    return torch.clamp(torch.round(y / scale), -127, 127) * scale


def in_place_of_a_view(y: Tensor) -> Tensor:
    y[:, :4].mul_(16).round_()
    return y


def in_a_new_tensor(y: Tensor) -> Tensor:
    new = torch.zeros(len(y), 16)
    new[:, 2:] = 8 * y[:, 2:]
    return new.trunc()


ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "round": lambda y: torch.round(16 * y) / 16,
    "straight-through": lambda y: y + (torch.round(16 * y) / 16 - y).detach(),
    "detached": lambda y: torch.floor(16 * y.detach()) / 16,
    "int": lambda y: (16 * y).int() / 16,
    "long": lambda y: (16 * y).long().float(),
    "int16": lambda y: (16 * y).short().float(),
    "int8": lambda y: (16 * y).to(torch.int8).float(),
    "float8": lambda y: y.to(torch.float8_e4m3fn).float(),
    "remainder": lambda y: y - torch.fmod(y, 0.06),
    "floor division": lambda y: y.detach() // 0.06,
    "rounding mode": lambda y: torch.div(y, 0.06, rounding_mode="trunc"),
    "several at once": lambda y: torch._foreach_round([16 * y])[0] / 16,
    "complex": lambda y: torch.round(4 * torch.view_as_real(torch.view_as_complex(y.reshape(-1, 8, 2)) * 1j)).flatten(
        1
    ),
    "transformed": lambda y: torch.round(4 * torch.fft.ifft(torch.fft.fft(y)).real) / 4,
    "sparse": lambda y: torch.round(4 * y.to_sparse().to_dense()) / 4,
    "mantissa": lambda y: (y.detach().view(torch.int32) >> 20 << 20).view(torch.float32),
    "signs": lambda y: 0.5 * torch.sign(y),
    "copied into whole numbers": lambda y: torch.empty(y.shape, dtype=torch.int32).copy_(16 * y).float(),
    "codebook": lambda y: GRID[torch.bucketize(y, GRID).clamp(max=64)],
    "fake quantization": lambda y: torch.fake_quantize_per_tensor_affine(y, 0.06, 0, -64, 64),
    "scale of the largest": by_largest,
    "view in place": in_place_of_a_view,
    "new tensor": in_a_new_tensor,
}


def interpolated(y: Tensor) -> Tensor:
    table = torch.linspace(-1, 1, 34).sin()
    u = 4 * (y.clamp(-3.9, 3.9) + 4)
    place = u.detach().floor().long()
    return table[place] * (1 - (u - place)) + table[place + 1] * (u - place)


def power_of_two(y: Tensor) -> Tensor:
    whole = torch.floor(y)
    return torch.exp2(y - whole) * torch.exp2(whole.to(torch.int32).float())


def logged(y: Tensor) -> Tensor:
    torch.bucketize(y.detach(), GRID), (100 * y.detach()).int().sum()
    return torch.tanh(y)


def in_used_memory(y: Tensor) -> Tensor:
    space = y.detach().clone()
    space.zero_()
    return y + (space + torch.arange(16)).long()


SOUND: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth": torch.tanh,
    "comparison": lambda y: y * (y > 0).int(),
    "largest": lambda y: y + y.topk(2).values.sum(-1, keepdim=True) + y.argmax(-1, keepdim=True),
    "number of choices": lambda y: torch.histc(y.topk(2).indices.float(), 16).to(torch.int32) + y[:, :16],
    "half precision": lambda y: y.bfloat16().float(),
    "positions": lambda y: y + (torch.arange(y.shape[-1]) * 0.3).round(),
    "positions of its type": lambda y: y + (torch.ones_like(y).cumsum(1).long() - 1),
    "memory used again": in_used_memory,
    "interpolation": interpolated,
    "phase": lambda y: torch.sin(2 * np.pi * (y - torch.floor(y))),
    "angle": lambda y: torch.cos(torch.remainder(y, 2 * np.pi)),
    "power of two": power_of_two,
    "log": logged,
    "a hundredth": lambda y: y + 0.01 * torch.round(4 * y),
}


@pytest.mark.parametrize("rounding", ROUNDING.values(), ids=ROUNDING)
def test_only_weights_whose_effect_is_rounded_are_found(rounding: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    first, other, last, x = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4), torch.randn(2, 8)

    def run() -> Tensor:
        y = rounding(first(x))
        return last(0.1 * first(x) + torch.nn.functional.pad(y, (0, 16 - y.shape[1])) + other(x))

    weights = [other.weight, first.weight, last.weight]
    assert rounded(run, weights) == ([1], False)
    assert misleading(run, weights, torch.Generator().manual_seed(0)) == [1]


@pytest.mark.parametrize("step", SOUND.values(), ids=SOUND)
def test_right_gradients_beside_rounding_and_choices_are_not_accused(step: Callable[[Tensor], Tensor]) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        first, last, x = nn.Linear(8, 16), nn.Linear(16, 16), torch.randn(2, 8)

        def run(first: nn.Linear = first, last: nn.Linear = last, x: Tensor = x) -> Tensor:
            return first(x) + step(last(torch.tanh(first(x))))

        assert misleading(run, [first.weight, last.weight], torch.Generator().manual_seed(seed)) == []


def test_mixed_precision_accuses_no_one_but_a_wrong_gradient() -> None:
    torch.manual_seed(0)
    layers, x = nn.ModuleList(nn.Linear(32, 32) for _ in range(6)), torch.randn(4, 32)

    def run(cut: int | None) -> Tensor:
        h = x
        with torch.autocast("cpu", torch.bfloat16):
            for index, layer in enumerate(layers):
                y = torch.tanh(layer(h))
                h = h + (0.4 * y + 0.6 * y.detach() if index == cut else y)
        return h.float()

    weights = [layer.weight for layer in layers]
    for cut in (None, 2):
        found = misleading(partial(run, cut), weights, torch.Generator().manual_seed(0))
        assert found == ([] if cut is None else [cut])


def test_only_what_comes_before_rounding_is_accused_and_not_where_it_hardly_matters() -> None:
    torch.manual_seed(0)
    layers, x = nn.ModuleList(nn.Linear(32, 32) for _ in range(8)), torch.randn(16, 32)

    def run(share: float) -> Tensor:
        h = x
        for index, layer in enumerate(layers):
            y = layer(h)
            h = h + torch.tanh(y + share * (torch.round(4 * y) / 4 - y).detach() if index == 4 else y) / 3
        return h

    weights = [layer.weight for layer in layers]
    found = misleading(partial(run, 1.0), weights, torch.Generator().manual_seed(0))
    assert 4 in found
    assert max(found) == 4
    assert misleading(partial(run, 0.02), weights, torch.Generator().manual_seed(0)) == []


class Block(nn.Module):
    """A residual block whose output is rounded beside a part of its input that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return 0.3 * x + torch.round(8 * self.outer(torch.relu(self.inner(x))) + 8 * x) / 8


class FixedPoint(nn.Module):
    """Three such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(8, 16), nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def inputs() -> list[Tensor]:
    return [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def test_what_is_rounded_beside_a_path_that_is_not_is_tried_or_refused() -> None:
    network = seeded(FixedPoint).eval()
    sampled = qcompress.measure(network, inputs(), OPTIONS, method="sampled")
    direct = qcompress.measure(network, inputs(), OPTIONS, method="direct")
    assert set(sampled.tried) == {part.name for part in direct.parts} - {"head"}
    np.testing.assert_allclose(sampled.cost[:-3], direct.cost[:-3], rtol=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        save_file(network.state_dict(), f"{folder}/model.safetensors")
        with pytest.raises(ModelError, match=r"outputs of 'blocks\.2' do not follow .* detached or rounded"):
            qcompress.measure(qcompress.open_model(folder, model=FixedPoint), inputs(), OPTIONS, method="sampled")


class Stepping(nn.Module):
    """Its backward pass is not implemented."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([nn.Linear(8, 8)]), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x = x * torch.heaviside(x, torch.tensor(0.5, dtype=x.dtype))
        return self.head(x)


def test_a_model_that_does_not_run_with_gradients_is_tried_option_by_option() -> None:
    network = seeded(Stepping).eval()
    sampled = qcompress.measure(network, inputs(), OPTIONS, method="sampled")
    direct = qcompress.measure(network, inputs(), OPTIONS, method="direct")
    assert set(sampled.tried) == {part.name for part in direct.parts}
    assert all(
        "does not run with gradients (RuntimeError: derivative for" in reason for reason in sampled.tried.values()
    )
    np.testing.assert_allclose(sampled.cost, direct.cost, rtol=1e-4)
    several = qcompress.measure(network, inputs(), OPTIONS, method="sampled", jobs=2)
    np.testing.assert_allclose(several.cost, direct.cost, rtol=1e-4)
    half = qcompress.measure(network.bfloat16(), [x.bfloat16() for x in inputs()], OPTIONS, method="sampled")
    assert set(half.tried) == set(sampled.tried)


def test_options_are_not_run_alone_where_mixed_precision_rounds_their_loss() -> None:
    network = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))

    def mixed(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    alone = qcompress.measure(network, inputs(), OPTIONS, method="sampled")
    found = qcompress.measure(network, inputs(), OPTIONS, method="sampled", forward=mixed)
    assert alone.ran is not None
    assert found.ran is None
    assert found.tried == {}
    assert any("half precision" in note for note in found.notes)
