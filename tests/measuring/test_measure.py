"""Measuring: the effects are the true ones, the model is left alone, and a cut run goes on."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import Measurement, low_rank, measure, prune_quantize
from qcompress.errors import DataError, ModelError, OptionsError
from qcompress.measuring.candidates import fitted
from qcompress.measuring.methods.replay import RecordedCalls
from qcompress.model.losses import CallableLoss, KullbackLeibler, MeanSquaredError
from qcompress.model.parts import survey
from tests.models import Residual, Reused, TiedLanguageModel, seeded

BITS = prune_quantize(bits=(2, 4), sparsity=(0,))


def gram(measurement: Measurement) -> np.ndarray:
    return measurement.factor @ measurement.factor.T


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_layer(layer: nn.Module) -> nn.Module:
    """The layer as a network whose output is its flattened, coarsely summed output (few numbers: exact roots)."""

    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(len(x), -1)[:, :12]

    return nn.Sequential(layer, Sums()).eval()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # name → (makes the layer, shape of a batch)
    "linear": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear on tokens": (lambda: nn.Linear(5, 3), (6, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (6, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (6, 3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (6, 2, 3, 3, 3)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (6, 4, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (6, 4, 4, 4)),
    "circular padding": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (6, 2, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (6, 3, 4)),
    "transposed 2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1), (6, 4, 3, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 4, 2), (6, 2, 2, 2, 2)),
}


@pytest.mark.parametrize("granularity", ["layer", 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_both_methods_agree_exactly_where_the_loss_is_quadratic_in_the_weights(
    kind: str, granularity: str | int
) -> None:
    layer, shape = LAYERS[kind]
    model = one_layer(seeded(layer))
    data = [inputs(*shape), inputs(*shape, seed=2)]
    both = [
        measure(model, data, BITS, method=method, loss="mse", granularity=granularity)
        for method in ("fisher", "direct")
    ]
    # float32 effects summed in another order
    np.testing.assert_allclose(both[0].cost, both[1].cost, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(gram(both[0]), gram(both[1]), rtol=1e-3, atol=1e-6 * both[0].cost.max())


def test_embeddings_agree_for_whole_tables_and_blocks_of_the_vocabulary() -> None:
    model = one_layer(seeded(lambda: nn.Embedding(9, 4)))
    data = [torch.randint(0, 9, (6, 3), generator=torch.Generator().manual_seed(1))]
    for granularity in ("layer", 4):
        fisher, direct = (
            measure(model, data, BITS, method=method, loss="mse", granularity=granularity)
            for method in ("fisher", "direct")
        )
        np.testing.assert_allclose(fisher.cost, direct.cost, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(gram(fisher), gram(direct), rtol=1e-3, atol=1e-7)


def test_a_forward_that_asks_for_half_precision_is_measured_in_it() -> None:
    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        if batch.dtype != torch.bfloat16:
            raise TypeError("give bfloat16")
        output: Tensor = model(batch)
        return output

    half = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))).bfloat16()
    data, options = (
        [torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).bfloat16()],
        prune_quantize(bits=(4,)),
    )
    for method in ("fisher", "sampled"):
        assert not measure(half, data, options, method=method, forward=forward).tried


@pytest.mark.parametrize("seed", range(6))
def test_rounding_inside_a_network_of_half_precision_is_not_taken_for_a_wrong_gradient(seed: int) -> None:
    torch.manual_seed(seed)
    convolutions = (
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, 2, padding=1),
        nn.Conv2d(16, 32, 3, 2, padding=1),
    )
    layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
    half = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).bfloat16()
    batches = [torch.randn(16, 3, 16, 16).bfloat16() for _ in range(2)]
    options = prune_quantize(bits=(4, 6), sparsity=(0,))
    measured = measure(half, batches, options)
    wide = measure(copy.deepcopy(half).float(), [batch.float() for batch in batches], options)
    assert not measured.tried
    ratios = measured.cost.reshape(-1, 3)[:, 1:] / wide.cost.reshape(-1, 3)[:, 1:]
    four, six = (
        ratios.T
    )  # codes of 6 bits are decoded to bfloat16, which has 8: single costs of theirs change by up to .19
    np.testing.assert_allclose(four, 1.0, rtol=0.1)
    np.testing.assert_allclose(six, 1.0, rtol=0.25)  # evaluated one by one, they were several times too large
    np.testing.assert_allclose(np.exp(np.log(six).mean()), 1.0, rtol=0.15)


@pytest.mark.parametrize("granularity", ["layer", 2])
@pytest.mark.parametrize("method", ["fisher", "direct"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed 1d", "embedding"])
def test_half_precision_is_measured_as_float32_up_to_its_rounding(
    kind: str, dtype: torch.dtype, method: str, granularity: str | int
) -> None:
    layer, shape = LAYERS.get(kind, (lambda: nn.Embedding(9, 4), None))
    data = [inputs(*shape).to(dtype) if shape else torch.arange(18).reshape(6, 3) % 9]
    half = one_layer(seeded(layer)).to(dtype)
    wide, wide_data = copy.deepcopy(half).float(), [batch.float() if shape else batch for batch in data]
    options = prune_quantize(bits=(2, 3), sparsity=(0,))
    found, expected = (
        measure(model, own, options, method=method, loss="kl", granularity=granularity)
        for model, own in ((half, data), (wide, wide_data))
    )
    assert half[0].weight.dtype == dtype
    # A change lies between two outputs, each rounded by up to `slack` a number. That moves the length of the change,
    # not its square by a share, so the bound holds for small changes too. Over 60 draws of weights and inputs the roots
    # of costs moved by up to a quarter of it, the products of rows (√2 longer than those roots) by up to 0.6.
    precision = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    slack = precision * float(wide(wide_data[0]).detach().abs().max())
    np.testing.assert_allclose(np.sqrt(found.cost), np.sqrt(expected.cost), rtol=0, atol=slack)
    length, slack = np.linalg.norm(expected.factor, axis=1), 2**0.5 * slack
    bound = slack * (length[:, None] + length) + slack**2
    assert (np.abs(gram(found) - gram(expected)) <= bound).all()


def test_the_prediction_for_blocks_of_one_linear_layer_is_the_true_loss_of_any_choice() -> None:
    model = seeded(lambda: nn.Linear(5, 6))
    data = [inputs(32, 5)]
    measurement = measure(model, data, BITS, loss="mse", granularity=2)
    candidates, _ = fitted(model, measurement.parts, BITS)
    weight = model.weight.detach()
    for choice in ([0, 1, 2], [2, 2, 2], [1, 0, 1]):
        chosen = [int(candidates.offsets[i] + c) for i, c in enumerate(choice)]
        effect = measurement.factor[chosen]
        predicted = measurement.cost[chosen].sum() + 0.5 * (np.square(effect.sum(0)).sum() - np.square(effect).sum())
        changed = torch.cat([weight[2 * i : 2 * i + 2] + candidates.change(i, c) for i, c in enumerate(choice)])
        true = float(((data[0] @ (changed - weight).T) ** 2).mean())
        assert predicted == pytest.approx(true, rel=1e-4)


def test_blocks_of_channels_add_up_to_their_layer() -> None:
    model = seeded(Residual)
    data = [inputs(16, 2, 5, 5)]
    whole = measure(model, data, BITS, loss="mse")  # constant curvature: the same for both
    blocks = measure(model, data, BITS, loss="mse", granularity=3)
    body = [i for i, part in enumerate(blocks.parts) if part.modules[0] == "body.0"]
    assert [blocks.parts[i].rows for i in body] == [(0, 3), (3, 6)]
    same_option = np.array([3 * i + 2 for i in body])  # 4 bits a block: rows are quantized one by one
    effect = blocks.factor[same_option].sum(0)
    layer = next(i for i, part in enumerate(whole.parts) if part.name == "body.0")
    assert np.square(effect).sum() == pytest.approx(2 * whole.cost[3 * layer + 2], rel=1e-3)


def test_tied_and_reused_modules_are_one_part_and_measured_in_all_their_places() -> None:
    data = [torch.randint(0, 11, (8, 3), generator=torch.Generator().manual_seed(3))]
    model = seeded(TiedLanguageModel)
    for method in ("fisher", "direct"):
        measurement = measure(model, data, BITS, method=method)
        assert [part.modules for part in measurement.parts] == [("embed", "head"), ("mix",)]
    fine = prune_quantize(bits=(8,), sparsity=(0,))
    for network, batch in ((model, data[0]), (seeded(Reused), inputs(64, 5))):
        loss = "mse"
        fisher, direct = (measure(network, [batch], fine, method=method, loss=loss) for method in ("fisher", "direct"))
        # 8 bits change little, so that the linearisation is nearly exact; random mixtures stand for 33 outputs
        np.testing.assert_allclose(fisher.cost, direct.cost, rtol=0.5 if network is model else 0.05, atol=1e-12)


@pytest.mark.parametrize(("factory", "shape"), [(Residual, (4, 2, 5, 5)), (Reused, (4, 5))])
def test_replay_gives_the_full_run(factory: type[nn.Module], shape: tuple[int, ...]) -> None:
    model, batch = seeded(factory), inputs(*shape)

    @torch.no_grad()
    def run() -> Tensor:
        return model(batch)

    replay = RecordedCalls(model)
    replay.record(run)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            original = module.weight.detach().clone()
            module.weight.data += 0.1
            full = run()
            assert torch.equal(replay.behind((name,), run), full), name
            assert torch.equal(replay.behind((name,), run), full), f"{name}, the second time"
            module.weight.data.copy_(original)


def test_replay_skips_what_lies_before_the_changed_module() -> None:
    ran: list[str] = []

    class Noted(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.norm(self.stem(x)))
            return self.head((x + self.body(x)).mean(dim=(2, 3)))

    class Body(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            ran.append("body")
            return super().forward(x)

    model = seeded(Noted)
    model.body = Body(*model.body)
    replay = RecordedCalls(model)
    replay.record(lambda: model(inputs(4, 2, 5, 5)))
    ran.clear()
    replay.behind(("head",), lambda: model(inputs(4, 2, 5, 5)))
    assert ran == []
    replay.behind(("body.2",), lambda: model(inputs(4, 2, 5, 5)))
    assert ran == ["body"]


@pytest.mark.parametrize("method", ["fisher", "direct"])
def test_the_model_is_left_as_it_was(method: str) -> None:
    model = seeded(Residual).train()
    model.head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure(model, [inputs(8, 2, 5, 5)], BITS, method=method)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad == (name != "head.weight") for name, parameter in model.named_parameters())
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["fisher", "direct"])
def test_a_cut_measurement_goes_on_and_ends_the_same(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.measuring.accumulation.SAVE_EVERY_S", 0.0)
    model, file = seeded(Residual), tmp_path / "sums.part"
    data = [inputs(8, 2, 5, 5, seed=seed) for seed in range(4)]
    whole = measure(model, data, BITS, method=method)
    seen: list[int] = []

    def cut(progress: object) -> None:
        seen.append(progress.batches)  # type: ignore[attr-defined]
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, data, BITS, method=method, cache=file, on_progress=cut)
    assert file.exists()
    resumed = measure(model, data, BITS, method=method, cache=file, on_progress=cut)
    assert seen == [1, 2, 3, 4]
    assert not file.exists()
    np.testing.assert_array_equal(resumed.cost, whole.cost)
    np.testing.assert_array_equal(resumed.factor, whole.factor)


def test_sums_of_another_measurement_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompress.measuring.accumulation.SAVE_EVERY_S", 0.0)
    model, file = seeded(Residual), tmp_path / "sums.part"
    data = [inputs(8, 2, 5, 5, seed=seed) for seed in range(2)]

    def cut(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, data, BITS, cache=file, on_progress=cut)
    with pytest.raises(DataError, match="another measurement"):
        measure(model, list(reversed(data)), BITS, cache=file)


def test_a_cache_that_is_damaged_or_a_folder_is_refused_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.measuring.accumulation.SAVE_EVERY_S", 0.0)
    model, file, data = seeded(Residual), tmp_path / "sums.part", [inputs(8, 2, 5, 5)]

    def cut(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, data, BITS, cache=file, on_progress=cut)
    numbers = bytearray(file.read_bytes())
    numbers[len(numbers) // 2] ^= 16
    file.write_bytes(numbers)
    with pytest.raises(DataError, match=r"delete .*sums\.part to measure from the start"):
        measure(model, data, BITS, cache=file)
    assert file.read_bytes() == numbers
    with pytest.raises(DataError, match="the cache of a model in memory is a file, and .* is a folder"):
        measure(model, data, BITS, cache=tmp_path)
    (tmp_path / "new.codes").write_text("mine")
    with pytest.raises(DataError, match=r"kept in a folder .*new\.codes, which is a file"):
        measure(model, data, BITS, cache=tmp_path / "new")


def test_a_measurement_comes_back_from_its_file(tmp_path: Path) -> None:
    measurement = measure(
        seeded(Residual), [inputs(8, 2, 5, 5)], prune_quantize() + low_rank(whitened=False), granularity="layer"
    )
    measurement.save(tmp_path / "m.npz")
    loaded = Measurement.load(tmp_path / "m.npz")
    assert loaded.parts == measurement.parts
    assert loaded.transforms == measurement.transforms
    assert loaded.skipped == measurement.skipped
    assert dict(loaded.fixed) == dict(measurement.fixed)
    np.testing.assert_array_equal(loaded.factor, measurement.factor)
    np.testing.assert_array_equal(loaded.resources["bytes"], measurement.resources["bytes"])


@pytest.mark.parametrize("positions", [1, 3])
def test_kl_effects_and_probes_give_the_hessian(positions: int) -> None:
    shape = (2, 5) if positions == 1 else (2, positions, 5)
    reference, change = inputs(*shape).double(), inputs(*shape, seed=4).double()
    p = reference.softmax(-1)
    hessian = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    true = torch.einsum("...i,...ij,...j->...", change, hessian, change).reshape(2, -1).mean(1)
    loss = KullbackLeibler()
    torch.testing.assert_close(loss.effects(change[None], reference, None)[0].flatten(1).square().sum(1), true)
    generator = torch.Generator().manual_seed(0)
    draws = [loss.probes(reference, None, generator) for _ in range(2000)]
    found = torch.stack([torch.einsum("kn...,n...->nk", probes, change).square().sum(1) for probes in draws]).mean(0)
    torch.testing.assert_close(found, true, rtol=0.05, atol=0)  # 16,000 probes: standard error about 1 %
    rise = loss.rise(reference + 1e-4 * change, reference, None)
    torch.testing.assert_close(rise, 0.5e-8 * true, rtol=1e-3, atol=0)


def test_mse_effects_and_probes_give_the_hessian() -> None:
    reference, change = inputs(2, 3, 2).double(), inputs(2, 3, 2, seed=4).double()
    loss = MeanSquaredError()
    true = loss.rise(reference + change, reference, None)
    torch.testing.assert_close(0.5 * loss.effects(change[None], reference, None)[0].flatten(1).square().sum(1), true)
    generator = torch.Generator().manual_seed(0)
    draws = [loss.probes(reference, None, generator) for _ in range(2000)]
    found = torch.stack([torch.einsum("kn...,n...->nk", probes, change).square().sum(1) for probes in draws]).mean(0)
    torch.testing.assert_close(0.5 * found, true, rtol=0.05, atol=0)


def test_a_callable_loss_has_a_first_order_term() -> None:
    model = seeded(lambda: nn.Linear(5, 3))
    batch = (inputs(64, 5), torch.randint(0, 3, (64,), generator=torch.Generator().manual_seed(5)))

    def cross_entropy(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(output, batch[1], reduction="none")

    fine = prune_quantize(bits=(8,), sparsity=(0,))
    fisher, direct = (
        measure(model, [batch], fine, method=method, loss=cross_entropy) for method in ("fisher", "direct")
    )
    assert fisher.cost[1] == pytest.approx(direct.cost[1], rel=0.05)
    assert CallableLoss(cross_entropy).name.endswith("cross_entropy")
    with pytest.raises(ModelError, match="one number per sample"):
        measure(model, [batch], fine, loss=lambda output, batch: output)


def test_fixed_cost_and_what_was_left_out_are_named() -> None:
    model = seeded(Residual)
    found = survey(model, [inputs(4, 2, 5, 5)])
    assert [part.name for part in found.parts] == ["stem", "body.0", "body.2", "head"]
    assert [(item.name, item.reason) for item in found.skipped] == [
        ("norm", "vectors such as scales, biases and statistics are too small to compress")
    ]
    state = model.state_dict()
    assert found.original["bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    weights = sum(model.get_submodule(part.name).weight.numel() for part in found.parts)
    assert found.fixed["bytes"] == found.original["bytes"] - 4 * weights
    assert found.original["macs"] == 25 * (6 * 2 * 9 + 6 * 3 * 9 + 6 * 6) + 24


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        ((batch for batch in [torch.zeros(2, 5)]), "generator"),
        (torch.zeros(2, 5), "pass \\[tensor\\]"),
        (5, "found int"),
        (["text"], "found str"),
        ([torch.full((2, 5), float("nan"))], "NaN"),
    ],
)
def test_unusable_data_gets_one_clear_error(data: object, message: str) -> None:
    with pytest.raises((DataError, ModelError), match=message):
        measure(nn.Linear(5, 3), data, BITS)  # type: ignore[arg-type]


def test_unusable_models_and_settings_get_one_clear_error() -> None:
    data = [inputs(4, 5)]
    with pytest.raises(ModelError, match="nothing in the model can be compressed.*two dimensions"):
        measure(nn.Sequential(nn.LayerNorm(5)), data, BITS)
    broken = nn.Linear(5, 3)
    with torch.no_grad():
        broken.weight[0, 0] = float("inf")
    with pytest.raises(ModelError):
        measure(broken, data, BITS)
    with pytest.raises(OptionsError, match="'fisher'|fisher, direct"):
        measure(nn.Linear(5, 3), data, BITS, method="guess")
    with pytest.raises(OptionsError, match="'kl', 'kl-tail', 'mse' or a callable"):
        measure(nn.Linear(5, 3), data, BITS, loss="l1")
    with pytest.raises(OptionsError, match="granularity"):
        measure(nn.Linear(5, 3), data, BITS, granularity=0)
    with pytest.raises(OptionsError, match="prune_quantize"):
        measure(nn.Linear(5, 3), data, ("4 bits",))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="pass forward"):
        measure(nn.LSTM(5, 3), data, BITS)


def test_measuring_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch, qcompress\n"
        "model = torch.nn.Linear(4, 3)\n"
        "qcompress.measure(model, [torch.ones(8, 4)], qcompress.prune_quantize(bits=(4,), sparsity=(0,)))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
