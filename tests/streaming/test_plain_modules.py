"""Models that are not of transformers, read block by block: the function that builds one, and its blocks' names."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qcompress
from qcompress.errors import EngineError, ModelError
from qcompress.model.opened import opened_of

OPTIONS = qcompress.prune_quantize(bits=(3, 4))
NAMED = ("first", "second", "third")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.outer = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(torch.relu(self.inner(self.norm(x))))
        return out


class Net(nn.Module):
    """A table of patterns, which is also read out at the end, around three blocks that are in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.first, self.second, self.third = Block(8), Block(8), Block(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, patterns: Tensor) -> Tensor:
        x = self.table(patterns).movedim(-1, 1)
        for block in (self.first, self.second, self.third):
            x = block(x)
        out: Tensor = self.head(self.scale * x.mean((2, 3)))
        return out


def trained() -> nn.Module:
    """A network whose batch norms have statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Net()
        for batch in batches():
            network(batch)
    return network.eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(12, (count, 5, 5), generator=generator) for count in (5, 3, 5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = trained().state_dict()
    del state["head.weight"]  # the same tensor as the table's
    save_file(state, tmp_path / "weights.safetensors")
    return tmp_path


def opened(folder: Path, **more: torch.dtype) -> nn.Module:
    return qcompress.open_model(folder, model=Net, blocks=NAMED, **more)


def test_it_runs_as_in_memory_with_its_blocks_on_disk(folder: Path) -> None:
    model, batch = opened(folder), batches()[0]
    assert [getattr(model, name).inner.weight.is_meta for name in NAMED] == [True] * 3
    assert model.head.weight is model.table.weight
    with torch.no_grad():
        assert torch.equal(model(batch), trained()(batch))
    assert opened(folder, dtype=torch.float64)(batch).dtype == torch.float64


def test_it_is_compressed_as_in_memory(folder: Path) -> None:
    model, network = opened(folder), trained()
    found = qcompress.measure(model, batches(), OPTIONS, method="sampled")
    expected = qcompress.measure(network, batches(), OPTIONS, method="sampled")
    assert found.model_fingerprint == expected.model_fingerprint
    # only gradients of the table, which is used twice, are added in another order
    np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-5, atol=1e-12)
    solution = qcompress.solve(qcompress.formulate(expected, {"bytes": "14%"}), "brute-force")
    smaller, batch = qcompress.apply(model, found, solution), batches()[0]
    assert opened_of(smaller) is not None
    with torch.no_grad():
        assert torch.equal(smaller(batch), qcompress.apply(network, expected, solution)(batch))


def test_it_is_told_apart_by_what_its_function_builds(folder: Path) -> None:
    def digest(change: Callable[[Net], object]) -> str:
        def make() -> nn.Module:
            network = Net()
            change(network)
            return network

        source = opened_of(qcompress.open_model(folder, model=make, blocks=NAMED))
        assert source is not None
        return source.identity.digest

    changes: list[Callable[[Net], object]] = [
        lambda network: None,
        lambda network: setattr(network.second.norm, "eps", 1e-2),
        lambda network: setattr(network, "settings", SimpleNamespace(cap=1.0)),
        lambda network: setattr(network, "settings", SimpleNamespace(cap=2.0)),
        lambda network: network.scale.fill_(0.25),
        lambda network: network.head.register_forward_hook(lambda module, args, output: -output),
    ]
    assert [digest(change) for change in changes] == [digest(change) for change in changes]
    assert len({digest(change) for change in changes}) == len(changes)


def test_stored_tensors_that_the_module_lacks_are_refused(folder: Path) -> None:
    save_file({"third.0.weight": torch.ones(2)}, folder / "more.safetensors")
    with pytest.raises(ModelError, match=r"more\.safetensors holds 'third\.0\.weight', which the model does not have"):
        opened(folder)


def test_what_is_not_given_or_does_not_fit_is_told(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json\. For another model give open_model\(folder, model="):
        qcompress.open_model(folder)
    with pytest.raises(ModelError, match="no list of repeated blocks.*: name them"):
        qcompress.open_model(folder, model=Net)
    with pytest.raises(ModelError, match="must be a function that returns a module, it gave dict"):
        qcompress.open_model(folder, model=dict)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"has no '0\.weight'"):
        qcompress.open_model(folder, model=lambda: nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(EngineError, match="writes models of transformers"):
        qcompress.compress(
            opened(folder), batches(), budget={"bytes": "14%"}, options=OPTIONS, method="sampled",
            target="compressed-tensors", output=folder / "out",
        )  # fmt: skip


class Detached(Block):
    """A block whose inner weight no gradient reaches, although its outputs depend on it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = torch.relu(self.inner(self.norm(torch.ones_like(x))))  # of the weights only
        out: Tensor = x + self.outer(hidden)
        return out


class PartlyDetached(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second = Detached(8)


def test_a_part_that_no_gradient_reaches_is_left_unchanged_by_name(folder: Path) -> None:
    model = qcompress.open_model(folder, model=PartlyDetached, blocks=NAMED)
    measurement = qcompress.measure(model, batches(), OPTIONS, method="sampled")
    (left,) = measurement.kept
    assert (left.name, left.size_bytes) == ("second.inner", 4 * 16 * 8 * 9)
    assert left.reason.startswith("no gradient reaches it")
    assert left in measurement.unchanged
