"""Odd networks read block by block: the same parts, sizes, costs and weights as in memory, or one early refusal."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import qcompress
from qcompress.errors import ModelError
from qcompress.model.losses import as_loss
from qcompress.model.opened import opened_of
from qcompress.streaming.losses import losses_of
from tests.measurements import solution
from tests.models import seeded

OPTIONS = qcompress.prune_quantize(bits=(3, 4), sparsity=(0,))
WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.a(x))


class Net(nn.Module):
    """A stem, two blocks and a head; every other network here differs from it in one way."""

    block: Callable[[], nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(type(self).block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def before(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def after(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for block in self.blocks:
            x = block(x)
        return self.after(x)


class RootParameters(Net):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.scale = nn.Parameter(torch.randn(7, WIDTH)), nn.Parameter(torch.rand(7, WIDTH))

    def before(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.positions

    def after(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale)


class RootParameterOfALayer(Net):
    """The head's weight, which is also used before the blocks, has another name in the root."""

    def __init__(self) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(5, WIDTH))
        self.head.weight = self.codebook

    def before(self, x: Tensor) -> Tensor:
        return self.stem(x) + x[..., :5] @ self.codebook

    def after(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.codebook) + self.head(x)


class Containers(Net):
    """A weight in a dict before the blocks, in a list after them, and one that is used on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.named = nn.ParameterDict({"before": torch.randn(WIDTH, WIDTH), "both": torch.randn(WIDTH, WIDTH)})
        self.listed = nn.ParameterList([torch.randn(WIDTH, WIDTH)])

    def before(self, x: Tensor) -> Tensor:
        return torch.tanh(self.stem(x) @ self.named["before"]) @ self.named["both"]

    def after(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.listed[0]) @ self.named["both"])


class TiedBlock(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class TiedInside(Net):
    block = TiedBlock


class TiedOutside(Net):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.blocks[1].a.weight

    def after(self, x: Tensor) -> Tensor:
        return self.head(self.last(x))


class Alias(Net):
    """Calls a layer of a block once more, by another path."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.blocks[0].a

    def after(self, x: Tensor) -> Tensor:
        return self.head(self.again(x))


class Experts(nn.Module):
    """Calls only those experts that a token chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 6)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            own = chosen == number
            if own.any():
                out[own] = expert(x[own]) * weight[own][:, None]
        return x + out


class LaterExperts(Net):
    block = Experts


class Unused(nn.Module):
    """Has a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.idle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.a(x))


class NeverCalled(Net):
    block = Unused

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.nothing = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(3, 3))


class LaterStem(Net):
    """Has a layer before the blocks, and a weight, that only some samples use."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.shift = nn.Linear(8, WIDTH), nn.Parameter(torch.randn(7, WIDTH))

    def before(self, x: Tensor) -> Tensor:
        own, out = x[:, 0, 0] != 0, self.stem(x)
        return out.index_add(0, own.nonzero()[:, 0], self.other(x[own]) + self.shift) if own.any() else out


class SideBlock(Block):
    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        return super().forward(x if side is None else x + side)


class LaterSide(LaterStem):
    """Hands the blocks more than their hidden states for some samples only."""

    block = SideBlock

    def forward(self, x: Tensor) -> Tensor:
        side, hidden = None if x[0, 0, 0] == 0 else self.other(x) + self.shift, self.stem(x)
        for block in self.blocks:
            hidden = block(hidden, side)
        return self.head(hidden)


class MixedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.a(self.norm(x).bfloat16())).float()


class Mixed(Net):
    block = MixedBlock


class HalfBlocks(Net):
    """Rounds what enters its blocks to their precision."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.bfloat16()

    def before(self, x: Tensor) -> Tensor:
        return self.stem(x).bfloat16()

    def after(self, x: Tensor) -> Tensor:
        return self.head(x.float())


class WideningBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Widening(Net):
    """Has blocks that turn half precision into single."""

    block = WideningBlock

    def __init__(self) -> None:
        super().__init__()
        self.stem.bfloat16()

    def before(self, x: Tensor) -> Tensor:
        return self.stem(x.bfloat16())


class NarrowingBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).bfloat16()


class Narrowing(Net):
    """Has blocks that turn single precision into half."""

    block = NarrowingBlock

    def after(self, x: Tensor) -> Tensor:
        return self.head(x.float())


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class ComputedOutside(Net):
    def __init__(self) -> None:
        super().__init__()
        self.stem = parametrizations.weight_norm(self.stem)
        self.shift = nn.Parameter(torch.randn(7, WIDTH))
        parametrize.register_parametrization(self, "shift", Doubled())

    def before(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.shift


class ComputedBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(self.a)


class ComputedInside(Net):
    block = ComputedBlock


REFUSED: dict[type[Net], str] = {
    TiedOutside: r"the block 'blocks\.1' shares the weight 'blocks\.1\.a\.weight' with 'last\.weight' outside",
    Alias: r"the block 'blocks\.0' shares the weight 'blocks\.0\.a\.weight' with 'again\.weight' outside",
    LaterSide: r"gives 'blocks\.0' other arguments .* for some samples",
    Narrowing: r"'blocks\.0' returns torch\.bfloat16 for hidden states in torch\.float32",
    ComputedInside: r"'blocks\.0\.a' computes its 'weight' from other parameters",
}
SAME = (
    Net, RootParameters, RootParameterOfALayer, Containers, TiedInside, LaterExperts, NeverCalled, LaterStem, Mixed,
    HalfBlocks, Widening, ComputedOutside,
)  # fmt: skip


def data() -> list[Tensor]:
    """Samples of equal shape; the first one takes the short way where there are two."""
    batches = [torch.randn(size, 7, 8, generator=torch.Generator().manual_seed(size)) for size in (9, 4)]
    batches[0][:2, 0, 0] = 0.0
    return batches


def in_memory_and_opened(kind: type[Net], folder: Path) -> tuple[nn.Module, nn.Module]:
    model = seeded(kind).eval()
    unique = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    save_file({name: tensor.detach() for name, tensor in unique.values()}, folder / "model.safetensors")
    return model, qcompress.open_model(folder, model=kind, blocks="blocks")


def weights_in(model: nn.Module) -> dict[str, Tensor]:
    """The values in the state dict of a model, opened or not."""
    source = opened_of(model)
    return {
        name: source.read(name) if source is not None and tensor.is_meta else tensor
        for name, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("kind", SAME)
def test_an_opened_model_is_measured_and_compressed_as_in_memory(kind: type[Net], tmp_path: Path) -> None:
    model, opened = in_memory_and_opened(kind, tmp_path)
    expected, found = (qcompress.measure(own, data(), OPTIONS, method="sampled", loss="mse") for own in (model, opened))
    assert found.parts == expected.parts
    assert found.labels == expected.labels
    assert {item.name: item.reason for item in found.skipped} == {item.name: item.reason for item in expected.skipped}
    assert (found.model_fingerprint, found.fixed) == (expected.model_fingerprint, expected.fixed)
    assert found.original == expected.original
    for name, uses in expected.resources.items():
        np.testing.assert_array_equal(found.resources[name], uses)
    assert (expected.ran is None) is (kind in {Mixed, HalfBlocks, Widening})  # they do not run in float32 as a whole
    assert (found.ran is None) is (kind is Mixed)  # nor its blocks
    none = np.zeros(len(found.cost), dtype=bool)
    same = (none if found.ran is None else found.ran) == (none if expected.ran is None else expected.ran)
    assert expected.ran is None or same.all()
    np.testing.assert_allclose(found.cost[same], expected.cost[same], rtol=1e-4, atol=1e-9)  # sums in another order

    choice = [1 + number % 2 for number in range(len(found.parts))]
    small, small_opened = (
        qcompress.apply(own, measured, solution(choice)) for own, measured in ((model, expected), (opened, found))
    )
    assert [parameter.dtype for parameter in small_opened.parameters()] == [own.dtype for own in small.parameters()]
    mine, others = weights_in(small), weights_in(small_opened)
    assert list(mine) == list(others)
    assert all(torch.equal(tensor, others[name]) for name, tensor in mine.items())
    batch = data()[0]
    with torch.no_grad():
        outputs = [own(batch) for own in (model, opened, small, small_opened)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3])
    transforms = tuple(options[option] for options, option in zip(found.transforms, choice, strict=True))
    (rises,) = losses_of(opened, found, [transforms], data(), data(), loss=as_loss("mse"))
    assert rises is not None
    loss = qcompress.mean_loss(model, small, data(), loss="mse")
    assert rises.mean() == pytest.approx(loss, rel=1e-4)


def test_a_choice_has_the_precision_that_an_opened_model_was_given_later(tmp_path: Path) -> None:
    _, opened = in_memory_and_opened(Net, tmp_path)
    opened.double()
    measurement = qcompress.measure(opened, [data()[0].double()], OPTIONS, method="sampled", loss="mse")
    small = qcompress.apply(opened, measurement, solution([1] * len(measurement.parts)))
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_block_by_block_is_refused_by_name(kind: type[Net], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=REFUSED[kind] + ".*load the model into memory"):
        _, opened = in_memory_and_opened(kind, tmp_path)
        qcompress.measure(opened, data(), OPTIONS, method="sampled", loss="mse")
