"""Fine-tuning lowers the loss and leaves the compression what it was: same options, same bytes, a record that holds."""

import contextlib
import copy
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import qcompress
from qcompress import integer_products, low_rank, prune_quantize
from qcompress.compressed.record import record_of
from qcompress.errors import DataError, ModelError, OptionsError
from qcompress.training.finetune import finetune
from qcompress.training.stable_rank import stable_rank
from qcompress.transforms.base import Keep
from solvers import judge
from tests.quick import slow_but


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    ).eval()


@pytest.fixture
def data():
    torch.manual_seed(1)
    return [torch.randn(32, 2, 6, 6) for _ in range(2)]


def compressed(model, data, options, granularity="layer"):
    """Every part takes its last option (not "keep")."""
    measurement = qcompress.measure(model, data, options, granularity=granularity)
    problem = qcompress.formulate(measurement, {"bytes": 1.0})
    choice = [len(group) - 1 for group in problem.options]
    return qcompress.apply(model, measurement, judge(problem, choice))


def kl(original, model, data):
    return float(qcompress.mean_loss(original, model, data))


OPTIONS = {
    "quantized": prune_quantize(bits=(3,), sparsity=(0,)),
    "pruned": prune_quantize(bits=(4,), sparsity=(0.75,)),
    "factored": low_rank(ratios=(0.25,), whitened=False),
    "spatial": low_rank(ratios=(0.4,), kinds=("spatial",), whitened=False),
    "composed": low_rank(ratios=(0.4,), whitened=False).then(prune_quantize(bits=(4,), sparsity=(0.3,))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", slow_but(["quantized", "composed"], OPTIONS))
def test_the_loss_falls_and_the_compression_stays(name, dtype, data, tmp_path):
    original, data = network().to(dtype), [batch.to(dtype) for batch in data]
    small = compressed(original, data, OPTIONS[name])
    before = copy.deepcopy(small.state_dict())
    tuned = finetune(small, data, 30, teacher=original, learning_rate=1e-3)

    assert kl(original, tuned, data) < 0.9 * kl(original, small, data)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert [own.transform for own in record_of(tuned).parts] == [own.transform for own in record_of(small).parts]
    saved = qcompress.save_compressed(tuned, tmp_path / "tuned.safetensors")
    assert saved.payload_bytes == qcompress.save_compressed(small, tmp_path / "small.safetensors").payload_bytes
    loaded = qcompress.load_compressed(saved.path, lambda: network().to(dtype))
    assert all(torch.equal(value, tuned.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_pruned_weights_stay_pruned(data):
    original = network()
    small = compressed(original, data, OPTIONS["pruned"])
    tuned = finetune(small, data, 20, teacher=original)
    for layer in (0, 3, 6):
        zero = small[layer].weight == 0
        assert zero.float().mean() >= 0.75 - 1 / zero.numel()
        assert (tuned[layer].weight[zero] == 0).all()
        assert not torch.equal(tuned[layer].weight, small[layer].weight)


def test_blocks_of_channels_are_trained_each_in_its_own_way(data, tmp_path):
    original = network()
    small = compressed(original, data, OPTIONS["quantized"], granularity=4)
    tuned = finetune(small, data, 20, teacher=original)
    assert kl(original, tuned, data) < kl(original, small, data)
    qcompress.save_compressed(tuned, tmp_path / "tuned.safetensors")


def test_a_loss_of_labels_needs_no_teacher(data):
    original = network()
    labelled = [(batch, original(batch).argmax(1)) for batch in data]
    small = compressed(original, data, OPTIONS["quantized"])

    def cross_entropy(output, batch):
        return nn.functional.cross_entropy(output, batch[1], reduction="none")

    def mean(model):
        return sum(cross_entropy(model(batch[0]), batch).mean().item() for batch in labelled)

    assert mean(finetune(small, labelled, 30, loss=cross_entropy)) < mean(small)


def test_training_that_does_harm_gives_the_model_back(data):
    original = network()
    small = compressed(original, data, OPTIONS["quantized"])
    seen = []
    tuned = finetune(small, data, 200, teacher=original, learning_rate=1e6, patience=3, on_progress=seen.append)
    assert [progress.step for progress in seen] == [0, 10, 20, 30]  # looks without a better loss, then the end
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in tuned.state_dict().items())


def test_an_interrupt_keeps_the_best(data):
    original = network()
    small = compressed(original, data, OPTIONS["quantized"])

    def press(progress):
        if progress.step >= 10:
            raise KeyboardInterrupt

    tuned = finetune(small, data, 1000, teacher=original, on_progress=press, validation=data)
    assert kl(original, tuned, data) <= kl(original, small, data)


@pytest.mark.parametrize(
    ("name", "dtype", "error", "cut_at", "goes_on_at"),
    [
        case if number in (0, 7, 10) else pytest.param(*case, marks=pytest.mark.slow)
        for number, case in enumerate(
            (name, dtype, error, *steps)
            for name, dtype in (("quantized", torch.float32), ("composed", torch.float32), ("pruned", torch.bfloat16))
            for error in (RuntimeError, KeyboardInterrupt)
            for steps in ((0, 0), (9, 8))
        )
    ],
)
def test_a_training_that_was_cut_goes_on_to_the_last_bit(
    name, dtype, error, cut_at, goes_on_at, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys.modules["qcompress.training.finetune"], "SAVE_EVERY_S", -1)
    original, data = network().to(dtype), [batch.to(dtype) for batch in data]
    small = compressed(original, data, OPTIONS[name])

    def cut(progress):
        if progress.step == cut_at:
            raise error

    settings = {"teacher": original, "learning_rate": 1e-3, "patience": 20, "cache": tmp_path / "training"}
    with pytest.raises(RuntimeError) if error is RuntimeError else contextlib.nullcontext():
        finetune(small, data, 20, **settings, on_progress=cut)
    assert (tmp_path / "training").exists()
    seen = []
    resumed = finetune(small, data, 20, **settings, on_progress=seen.append)
    assert [progress.step for progress in seen] == list(range(goes_on_at, 21))
    assert not (tmp_path / "training").exists()
    whole = finetune(small, data, 20, teacher=original, learning_rate=1e-3, patience=20)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_shuffled_data_is_shuffled_by_the_seed_also_when_a_training_goes_on(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["qcompress.training.finetune"], "SAVE_EVERY_S", -1)
    original = network()
    small = compressed(original, data, OPTIONS["quantized"])
    shuffled = DataLoader(torch.cat(data), batch_size=10, shuffle=True)  # 7 batches a pass
    settings = {"teacher": original, "learning_rate": 1e-3, "patience": 20}

    def press(progress):
        if progress.step == 10:
            raise KeyboardInterrupt

    state = torch.get_rng_state()
    whole = finetune(small, shuffled, 20, **settings)
    finetune(small, shuffled, 20, **settings, cache=tmp_path / "training", on_progress=press)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    seen = []
    resumed = finetune(small, shuffled, 20, **settings, cache=tmp_path / "training", on_progress=seen.append)
    assert seen[0].step == 9
    other = finetune(small, shuffled, 20, **settings, seed=1)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    assert not torch.equal(other[3].weight, whole[3].weight)


def test_a_cache_of_another_training_or_a_damaged_one_is_refused(data, tmp_path):
    original = network()
    small = compressed(original, data, OPTIONS["quantized"])

    def press(progress):
        raise KeyboardInterrupt

    cache = tmp_path / "training"
    finetune(small, data, 40, teacher=original, cache=cache, on_progress=press)
    with pytest.raises(DataError, match="holds another training"):
        finetune(small, data, 41, teacher=original, cache=cache)
    with pytest.raises(DataError, match="holds another training"):
        finetune(small, data[1:], 40, teacher=original, cache=cache)
    cache.write_bytes(cache.read_bytes()[:-20])
    with pytest.raises(DataError, match="is not a complete qcompress training"):
        finetune(small, data, 40, teacher=original, cache=cache)


@pytest.mark.parametrize("name", ["quantized", "pruned", "composed"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_frozen_stays_bit_by_bit_and_its_record_too(seed, name, data):
    original = network(seed)
    small = compressed(original, data, OPTIONS[name])
    for parameter in small[3].parameters():
        parameter.requires_grad_(False)
    tuned = finetune(small, data, 5, teacher=original)
    assert not torch.equal(tuned[6].bias, small[6].bias)
    for value, before in zip(tuned[3].parameters(), small[3].parameters(), strict=True):
        assert torch.equal(value, before)
    (part,), (before,) = (
        [own for own in record_of(model).parts if own.part.modules[0] == "3"] for model in (tuned, small)
    )
    assert part.transform == before.transform
    assert all(torch.equal(value, before.stored[key]) for key, value in part.stored.items())


def test_the_result_evaluates_and_modes_gradients_and_statistics_are_left_alone(data):
    original = network()
    small = compressed(original, data, OPTIONS["quantized"]).train()
    small[0].weight.requires_grad_(False)
    tuned = finetune(small, data, 5, teacher=original)
    assert not any(module.training for module in tuned.modules())
    assert small.training
    assert not tuned[0].weight.requires_grad
    assert torch.equal(tuned[0].weight, small[0].weight)
    assert torch.equal(tuned[1].running_mean, small[1].running_mean)
    assert all(parameter.grad is None for parameter in tuned.parameters())
    assert not original.training


def test_a_model_that_is_not_compressed_is_trained_as_it_is(data):
    original, other = network(), network()
    with torch.no_grad():
        other[6].weight.mul_(0.5)
    assert kl(original, finetune(other, data, 20, teacher=original), data) < kl(original, other, data)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"steps": 0}, "steps=0"), ({"learning_rate": 0}, "learning_rate=0"), ({"patience": 0}, "patience=0")],
)
def test_numbers_outside_their_range_are_refused(data, arguments, word):
    with pytest.raises(OptionsError, match=word):
        finetune(network(), data, **{"steps": 1, "teacher": network(), **arguments})


def test_distillation_without_a_teacher_is_refused(data):
    with pytest.raises(OptionsError, match="teacher"):
        finetune(network(), data, 1)


def test_the_penalty_makes_weights_low_rank(data):
    original, ranks = network(), {"3": 2, "6": 1}

    def penalty(model):
        return 0.1 * stable_rank(model, ranks)

    trained = finetune(original, data, 60, teacher=original, learning_rate=3e-3, penalty=penalty)
    assert stable_rank(trained, ranks) < 0.8 * stable_rank(original, ranks)
    with torch.no_grad():
        added = float(penalty(trained)), float(penalty(original))
    total = added[0] + qcompress.mean_loss(original, trained, data)
    assert total < added[1]  # what is kept is the best of both together


def test_a_rank_that_is_not_there_is_refused():
    with pytest.raises(OptionsError, match="asked for 9"):
        stable_rank(network(), {"3": 9})


def test_kept_parts_stay_kept(data):
    original = network()
    measurement = qcompress.measure(original, data, OPTIONS["quantized"])
    problem = qcompress.formulate(measurement, {"bytes": 1.0})
    small = qcompress.apply(original, measurement, judge(problem, [1, 0, 1]))
    tuned = finetune(small, data, 10, teacher=original)
    assert isinstance(record_of(tuned).parts[1].transform, Keep)
    assert record_of(tuned).parts[1].stored == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_with_sparse_gradients_are_trained_as_any_other(dtype):
    tuned = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 8, sparse=sparse), nn.Flatten(), nn.Linear(40, 4)).to(dtype)
        batches = [torch.randint(20, (32, 5), generator=torch.Generator().manual_seed(1))]
        options = prune_quantize(bits=(2,), sparsity=(0,))
        small = qcompress.compress(model, batches, budget={"bytes": 0.9}, options=options).model
        tuned.append(finetune(small, batches, 5, teacher=model, patience=5))
    for name, weight in tuned[0].state_dict().items():
        assert torch.equal(weight, tuned[1].state_dict()[name])


@pytest.mark.parametrize("rate", [1e6, 1e30])
@pytest.mark.parametrize("loss", ["kl", lambda output, batch: output.square().sum(1).exp()])
@pytest.mark.parametrize("options", [OPTIONS["quantized"], OPTIONS["composed"], integer_products(("dynamic",))])
def test_a_training_that_diverges_ends_with_the_best_so_far(data, rate, loss, options, caplog):
    original = network()
    small = compressed(original, data, options)
    teacher = original if loss == "kl" else None
    seen = []
    tuned = finetune(small, data, 40, teacher=teacher, loss=loss, learning_rate=rate, on_progress=seen.append)
    assert min(item.best for item in seen) == seen[-1].best
    assert kl(original, tuned, data) == kl(original, small, data) or seen[-1].best < seen[0].before
    assert record_of(tuned) is not None
    assert all(value.isfinite().all() for value in tuned.state_dict().values())
    if rate == 1e30:
        assert "a lower learning rate helps" in caplog.text


def test_a_model_that_is_not_finite_before_training_is_still_refused(data):
    model = network()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN or infinity"):
        finetune(model, data, 2, teacher=network())
    with pytest.raises(ModelError, match="NaN or infinity"):
        finetune(network(), data, 2, teacher=model)
    with pytest.raises(ModelError, match="NaN or infinite"):
        finetune(network(), data, 2, loss=lambda output, batch: output.sum(1) * float("nan"))
