"""Weights as rows, wherever a module keeps them."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import apply, compress, formulate, load_compressed, measure, prune_quantize, save_compressed, solve
from qcompress.model.parts import survey
from qcompress.model.sites import Site, sites_of

EIGHT = prune_quantize(bits=(8,), sparsity=(0,))


class Experts(nn.Module):
    """A stack of matrices, multiplied from either side."""

    def __init__(self, inputs_first: bool) -> None:
        super().__init__()
        self.is_transposed = inputs_first
        self.up = nn.Parameter(torch.randn(3, 6, 4) if inputs_first else torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        up = self.up if self.is_transposed else self.up.mT
        return torch.stack([x[i % len(x)] @ up[i] for i in range(3)])


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "stack": Experts(False), "stack, inputs first": Experts(True), "attention": nn.MultiheadAttention(4, 2),
        "recurrent": nn.GRU(3, 5, bidirectional=True), "bilinear": nn.Bilinear(2, 3, 4), "bag": nn.EmbeddingBag(5, 3),
        "convolution": nn.Conv2d(4, 6, 3, groups=2), "transposed": nn.ConvTranspose1d(4, 6, 3),
    }  # fmt: skip


def test_rows_give_the_weight_back() -> None:
    for name, module in modules().items():
        sites = [site for site in sites_of(module) if not site.why_not()]
        assert sites, name
        for site in sites:
            assert torch.equal(site.from_rows(site.rows), site.weight), (name, site.parameter)


def test_rows_of_a_stack_are_output_channels_whichever_side_inputs_are_on() -> None:
    plain, turned = Experts(False), Experts(True)
    with torch.no_grad():
        turned.up.copy_(plain.up.mT)
    assert torch.equal(Site(plain, "up").rows, Site(turned, "up").rows)


@pytest.mark.parametrize("granularity", ["layer", 3])
def test_each_matrix_of_a_stack_has_parts_of_its_own(granularity: str | int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Experts(False), nn.Linear(4, 2))
    found = survey(model, [torch.randn(3, 6)], granularity=granularity)
    ends = [(0, 4), (4, 8), (8, 12)] if granularity == "layer" else [(0, 3), (3, 4), (4, 7), (7, 8), (8, 11), (11, 12)]
    assert [part.rows for part in found.parts if part.path == "0.up"] == ends


def test_vectors_are_no_parts_and_an_unused_weight_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model.spare = nn.Parameter(torch.ones(4, 4))
    model.token = nn.Parameter(torch.ones(1, 1, 8))
    found = survey(model, [torch.randn(2, 3, generator=torch.Generator().manual_seed(0))])
    assert [part.name for part in found.parts] == ["0"]
    reasons = {item.name: item.reason for item in found.skipped}
    assert set(reasons) == {"token", "1", "spare"}
    assert "no batch" in reasons["spare"]


class Held(nn.Module):
    """Multiplies with a matrix that is a buffer, and adds tokens."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(1, 1, 3))
        self.second = nn.Parameter(torch.ones(3))
        self.register_buffer("matrix", matrix)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix + self.first[0] + self.second


def test_what_is_left_out_has_the_name_of_its_parameter_or_buffer() -> None:
    matrix = torch.eye(3)
    model = nn.Sequential(nn.Linear(3, 3), Held(matrix), Held(matrix))
    model.register_parameter("scale", nn.Parameter(torch.ones(3)))
    data = [torch.randn(8, 3, generator=torch.Generator().manual_seed(0))]
    left = {item.name: (item.size_bytes, item.reason) for item in survey(model, data).skipped}
    vector = "vectors such as scales, biases and statistics are too small to compress"
    buffer = "a buffer: make it a parameter to compress it"
    assert left == {
        "scale": (12, vector), "1.first": (12, vector), "1.second": (12, vector), "1.matrix": (36, buffer),
        "2.first": (12, vector), "2.second": (12, vector),
    }  # fmt: skip
    report = compress(model, data, budget={"bytes": 0.99}, options=EIGHT, validation=data).report
    assert f"- {buffer} (" in report.to_markdown().partition("Left unchanged")[2]


def test_a_norm_that_is_the_whole_model_is_named_by_its_weight() -> None:
    from qcompress.model.weights import find_weights

    assert [item.name for item in find_weights(nn.LayerNorm(3))[1]] == ["weight"]


def test_a_module_is_left_out_by_its_name() -> None:
    model = nn.Sequential(nn.LSTM(3, 4), Last(), nn.Linear(4, 2))
    data = [torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))]
    assert [part.name for part in measure(model, data, EIGHT, skip="0").parts] == ["2"]
    only = measure(model, data, EIGHT, only="0.weight_hh_l0")
    assert [part.name for part in only.parts] == ["0.weight_hh_l0"]


class Last(nn.Module):
    """The outputs of a recurrent layer without its state."""

    def forward(self, given: tuple[Tensor, object]) -> Tensor:
        return given[0]


class Bags(nn.Module):
    """Words of bags added up, and a bilinear form of the two halves."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.form = nn.EmbeddingBag(11, 6, mode=mode), nn.Bilinear(3, 3, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bag(ids)
        return self.form(x[:, :3], x[:, 3:])


@pytest.mark.parametrize("granularity", ["layer", 4])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_bags_and_bilinear_layers_cost_what_trying_them_does(mode: str, granularity: str | int, tmp_path) -> None:
    torch.manual_seed(0)
    model, data = Bags(mode), [torch.randint(11, (8, 3))]
    tried, linearised = (
        measure(model, data, EIGHT, method=method, granularity=granularity) for method in ("direct", "fisher")
    )
    np.testing.assert_allclose(linearised.cost, tried.cost, rtol=0.1, atol=0.01 * tried.cost.max())
    solution = solve(formulate(tried, {"bytes": 0.45}), "greedy")
    smaller = apply(model, tried, solution)
    saved = save_compressed(smaller, tmp_path / "model.safetensors")
    assert saved.payload_bytes == solution.usage["bytes"]
    assert torch.equal(load_compressed(saved.path, lambda: Bags(mode))(data[0]), smaller.eval()(data[0]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_weights_of_eight_bits_stay_and_are_named(dtype: torch.dtype) -> None:
    class Scaled(nn.Linear):
        """Computes with a parameter of 8 bits."""

        def __init__(self) -> None:
            super().__init__(6, 4)
            self.eight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ self.eight.float()

    result = compress(nn.Sequential(Scaled(), nn.ReLU(), nn.Linear(4, 3)), [torch.randn(16, 6)], budget={"bytes": 0.9})
    assert "which PyTorch stores but does not compute with" in result.report.skipped["0.eight"]
