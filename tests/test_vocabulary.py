"""A vocabulary in blocks: the same function, factors closest for how frequent words are, saved to the byte."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qcompress import (
    apply,
    compress,
    finetune,
    fold_,
    formulate,
    load_compressed,
    low_rank,
    mean_loss,
    measure,
    prune_quantize,
    save_compressed,
    solve,
)
from qcompress.compressed.factored import FactoredEmbedding, factored
from qcompress.errors import DataError, ModelError, OptionsError
from qcompress.measuring.inputs.moments import second_moments
from qcompress.model.parts import survey
from qcompress.model.tensors import total_bytes
from qcompress.transforms.base import Target, Weight
from qcompress.transforms.low_rank.factors import LowRank
from qcompress.vocabulary import (
    BlockedEmbedding,
    count_words,
    split_vocabulary_,
    vocabulary_blocks,
)
from tests.measurements import solution
from tests.models import TiedLanguageModel

WORDS, FEATURES = 60, 16
CODES = prune_quantize(bits=(4, 8), sparsity=(0, 0.5))
RANKS = low_rank(ranks=(2, 4, 6), whitened=True)
JOINT = CODES + RANKS + RANKS.then(CODES)


def zipf(num_words: int = WORDS) -> Tensor:
    """Counts that fall as natural words' do, spread over the ids."""
    order = torch.randperm(num_words, generator=torch.Generator().manual_seed(3))
    return (1000 / (1 + order)).floor()


class Bag(nn.Module):
    """Words to classes; the mean of their features in between."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, FEATURES, padding_idx=5)
        self.fc = nn.Linear(FEATURES, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.words(ids).mean(1))


def bag(*, split: bool = True) -> Bag:
    torch.manual_seed(0)
    model = Bag().eval()
    return split_vocabulary_(model, "words", vocabulary_blocks(zipf(), 3)) if split else model


def texts(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(zipf() + 1, count * 16 * 7, replacement=True, generator=generator)
    return list(drawn.view(count, 16, 7))


def embedding_weight(rows: Tensor, frequencies: Tensor | None = None) -> Weight:
    words, features = rows.shape
    target = Target(layer="Embedding", channels=words, per_channel=features, dtype=rows.dtype, macs=0, lookups=7)
    return Weight(rows, target, frequencies)


# ---- blocks ----


@given(counts=st.lists(st.integers(0, 5), min_size=15, max_size=40), num_blocks=st.integers(1, 4))
def test_every_word_is_in_one_block_and_no_rarer_word_is_in_an_earlier_one(counts: list[int], num_blocks: int) -> None:
    blocks = vocabulary_blocks(counts, num_blocks)
    assert sorted(torch.cat(blocks.words).tolist()) == list(range(len(counts)))
    assert len(blocks.sizes) == num_blocks
    for first, then in zip(blocks.words, blocks.words[1:], strict=False):
        assert min(counts[word] for word in first) >= max(counts[word] for word in then)
        assert abs(len(then) - 2 * len(first)) <= 2
    assert float(blocks.frequencies.sum()) == pytest.approx(1)
    assert float(blocks.frequencies.min()) > 0


def test_counts_are_those_of_all_batches() -> None:
    batches = [torch.tensor([[0, 1], [1, 3]]), torch.tensor([], dtype=torch.int64), torch.tensor(3)]
    assert count_words(batches, 5).tolist() == [1, 2, 0, 2, 0]
    for wrong in (5, -1):
        with pytest.raises(DataError, match="ids must be from 0 to 4"):
            count_words([torch.tensor([wrong])], 5)


@pytest.mark.parametrize(
    ("counts", "asked", "message"),
    [
        ([1.0, float("nan")], {}, "one finite number"),
        ([1.0, -1.0], {}, "not negative"),
        ([], {}, "for every word"),
        ([1] * 6, {"num_blocks": 3}, "num_blocks must be 1 to 2 for 6 words, got 3"),
        ([1] * 6, {"num_blocks": 0}, "got 0"),
        ([1] * 6, {"sizes": [2, 3]}, "add up to 6"),
        ([1] * 6, {"sizes": [0, 6]}, "must be positive"),
    ],
)
def test_blocks_that_cannot_be_are_refused(counts: list[float], asked: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(OptionsError, match=message):
        vocabulary_blocks(counts, **asked)


# ---- the module ----


@settings(deadline=None, max_examples=30)
@given(shape=st.lists(st.integers(0, 4), max_size=3), num_blocks=st.integers(1, 4), narrow=st.booleans())
def test_the_split_layer_is_the_same_function(shape: list[int], num_blocks: int, narrow: bool) -> None:
    embedding = nn.Embedding(WORDS, FEATURES, padding_idx=5)
    blocked = BlockedEmbedding(embedding, vocabulary_blocks(zipf(), num_blocks))
    ids = torch.randint(WORDS, shape, dtype=torch.int32 if narrow else torch.int64)
    assert torch.equal(blocked(ids), embedding(ids))
    assert blocked.position.dtype == torch.int16


def test_gradients_are_those_of_the_dense_layer_and_none_comes_to_padding() -> None:
    dense, blocked = bag(split=False), bag()
    ids = torch.cat([*texts(), torch.full((2, 7), 5).view(2, 7)])
    for model in (dense, blocked):
        model(ids).square().sum().backward()
    assert isinstance(blocked.words, BlockedEmbedding)
    gradients = torch.cat([block.weight.grad for block in blocked.words.blocks])
    torch.testing.assert_close(gradients[blocked.words.position.long()], dense.words.weight.grad)
    assert not gradients[int(blocked.words.position[5])].any()


def test_words_outside_the_vocabulary_are_refused() -> None:
    for wrong in (WORDS, -1):
        with pytest.raises(IndexError):
            bag().words(torch.tensor([wrong]))


def test_a_large_vocabulary_takes_four_bytes_a_word() -> None:
    blocked = BlockedEmbedding(nn.Embedding(40_000, 1), vocabulary_blocks(torch.arange(40_000), 2))
    assert blocked.position.dtype == torch.int32
    assert torch.equal(blocked.to_dense()(torch.tensor([39_999])), blocked(torch.tensor([39_999])))


def test_what_cannot_be_split_is_named() -> None:
    blocks = vocabulary_blocks(zipf(), 2)
    for name, found in (("fc", "Linear"), ("nowhere", "nothing"), ("", "Bag")):
        with pytest.raises(
            ModelError, match=f"'{name}' is {found}, not an Embedding inside the model; there are: words"
        ):
            split_vocabulary_(bag(split=False), name, blocks)
    tied = TiedLanguageModel()
    with pytest.raises(ModelError, match="its weight is shared with"):
        split_vocabulary_(tied, "embed", vocabulary_blocks(torch.ones(tied.embed.num_embeddings), 2))
    for setting, message in (("max_norm", "max_norm"), ("scale_grad_by_freq", "scales gradients")):
        model = bag(split=False)
        setattr(model.words, setting, 1.0)
        with pytest.raises(ModelError, match=message):
            split_vocabulary_(model, "words", blocks)
    with pytest.raises(OptionsError, match="the blocks have 7 words, 'words' has 60"):
        split_vocabulary_(bag(split=False), "words", vocabulary_blocks([1] * 7, 2))


# ---- factors ----


@pytest.mark.parametrize("shape", [(40, 12), (8, 12), (12, 12), (1, 5)])
@pytest.mark.parametrize("zeros", [False, True])
def test_no_factors_of_that_rank_are_closer_for_words_as_frequent_as_these(shape: tuple[int, int], zeros: bool) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    frequencies = torch.logspace(0, -3, shape[0])
    if zeros:
        frequencies[::3] = 0.0
    weight = embedding_weight(rows, frequencies)
    values = torch.linalg.svdvals(rows.double() * frequencies.double().sqrt()[:, None]).square()
    for rank in range(1, min(shape) + 1):
        least = float(values[rank:].sum() / values.sum()) if values.sum() else 0.0
        found = weight.relative_error(LowRank(ranks=rank, whitened=True).approximate(weight))
        assert found == pytest.approx(least, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_factors_take_the_predicted_bytes_and_give_the_approximation(dtype: torch.dtype) -> None:
    rows = torch.randn(FEATURES, WORDS).to(dtype).T  # not contiguous
    weight = embedding_weight(rows, torch.rand(WORDS))
    for transform in [own for own in JOINT.for_weight(weight) if isinstance(own.transform, LowRank)]:
        own = transform.transform
        stored = own.encode(weight)
        assert sum(array.numel() * array.element_size() for array in stored.values()) == own.size_bytes(weight.target)
        assert torch.equal(own.decode(stored, weight.target), own.approximate(weight))
        assert own.macs(weight.target) == 7 * own.ranks[0] * FEATURES  # type: ignore[attr-defined]


def test_zero_and_constant_weights_and_words_that_never_come() -> None:
    for value in (0.0, 0.5):
        for frequencies in (torch.zeros(9), torch.ones(9)):
            weight = embedding_weight(torch.full((9, 6), value), frequencies)
            found = LowRank(ranks=1, whitened=True).approximate(weight)
            torch.testing.assert_close(found, weight.rows, rtol=1e-5, atol=0)


def test_frequencies_come_from_the_counts_of_a_block_and_else_from_the_data() -> None:
    model, data = bag(), texts()
    parts = survey(model, data).parts[:3]
    found, _ = second_moments(model, parts, data, None)
    blocks = vocabulary_blocks(zipf(), 3)
    for part, words in zip(parts, blocks.words, strict=True):
        expected = (zipf()[words] + 1) / (zipf()[words] + 1).sum()
        torch.testing.assert_close(found[part.name], expected.float())
    whole = bag(split=False)
    (part, _) = survey(whole, data).parts
    counted = count_words(data, WORDS)
    torch.testing.assert_close(second_moments(whole, [part], data, None)[0]["words"], counted / counted.sum())


# ---- measured, applied, saved ----


@pytest.mark.parametrize("split", [True, False])
def test_both_methods_cost_the_options_of_blocks_alike(split: bool) -> None:
    model, options = bag(split=split), JOINT
    fisher, direct = (measure(model, texts(), options, method=method, loss="mse") for method in ("fisher", "direct"))
    assert fisher.transforms == direct.transforms
    np.testing.assert_allclose(fisher.cost, direct.cost, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(fisher.factor @ fisher.factor.T, direct.factor @ direct.factor.T, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("split", [True, False])
def test_every_choice_is_applied_saved_and_loaded_to_the_byte(split: bool, tmp_path: Path) -> None:
    model, data = bag(split=split), texts()
    measurement = measure(model, data, JOINT, loss="mse")
    rng = np.random.default_rng(0)
    budget = formulate(measurement, {"bytes": 1.0, "macs": 1e9})
    for run in range(6):
        choice = [int(rng.integers(len(own))) for own in measurement.transforms]
        if run == 0:  # a factored one in every block
            choice = [max(i for i, own in enumerate(options) if own.kind == "low_rank") for options in
                      measurement.transforms[:-1]] + [0]  # fmt: skip
        small = apply(model, measurement, solution(choice))
        usage = budget.evaluate(choice).usage
        with FlopCounterMode(display=False) as counter:
            output = small(data[0])
        assert counter.get_total_flops() / 2 / len(data[0]) == usage["macs"]
        saved = save_compressed(small, tmp_path / "small.safetensors")
        assert saved.payload_bytes == usage["bytes"]

        def factory(split: bool = split) -> Bag:
            made = Bag().eval()
            sizes = vocabulary_blocks(zipf(), 3).sizes
            return split_vocabulary_(made, "words", vocabulary_blocks([0] * WORDS, sizes=sizes)) if split else made

        loaded = load_compressed(saved.path, factory)
        assert torch.equal(loaded(data[0]), output)
        assert list(loaded.state_dict()) == list(small.state_dict())
        again = save_compressed(loaded, tmp_path / "again.safetensors")
        assert again.path.read_bytes() == saved.path.read_bytes()
        copied = copy.deepcopy(small)
        assert torch.equal(copied(data[0]), output)
        folded = fold_(small)
        assert type(folded.words) is nn.Embedding
        torch.testing.assert_close(folded(data[0]), output, rtol=1e-4, atol=1e-5)
        folded.load_state_dict(bag(split=False).state_dict())


def test_the_place_of_the_words_is_counted_once_and_always() -> None:
    plain, split = (measure(bag(split=own), texts(), CODES, loss="mse") for own in (False, True))
    assert split.original["bytes"] - plain.original["bytes"] == 2 * WORDS
    assert split.fixed["bytes"] - plain.fixed["bytes"] == 2 * WORDS
    assert total_bytes(bag()) == split.original["bytes"]


def test_members_are_named_masked_and_can_be_exported() -> None:
    layer = nn.Embedding(9, 6, padding_idx=2)
    layer.weight.requires_grad_(False)
    weight = embedding_weight(layer.weight.detach())
    transform = LowRank(ranks=2)
    small = factored(layer, transform.factors(transform.encode(weight), weight.target))
    assert isinstance(small, FactoredEmbedding)
    assert list(small.state_dict()) == ["basis.weight", "codes.weight"]
    assert "Basis(rank=2, features=6)" in str(small)
    assert small.codes.padding_idx == 2
    assert not small(torch.tensor([2])).any()
    assert not any(parameter.requires_grad for parameter in small.parameters())
    model, data = bag(), texts()
    measurement = measure(model, data, RANKS, loss="mse")
    small = apply(model, measurement, solution([1, 2, 3, 0]))
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(small, (data[0],), dynamic_shapes=({0: batch},))
    assert torch.equal(exported.module()(data[1][:5]), small(data[1][:5]))
    fresh = apply(model, measurement, solution([1, 2, 3, 0]))
    fresh.load_state_dict(small.state_dict())


def test_one_solve_chooses_the_blocks_ranks_with_everything_else(tmp_path: Path) -> None:
    result = compress(bag(), texts(), budget={"bytes": 0.3}, options=JOINT, loss="mse", solver="brute-force")
    assert result.report.usage["bytes"] <= 0.3 * result.measurement.original["bytes"]
    saved = save_compressed(result.model, tmp_path / "small.safetensors")
    assert saved.payload_bytes == result.report.usage["bytes"]
    families = []
    for options in (CODES, RANKS):  # each is among the joint options: it cannot predict less
        measurement = measure(bag(), texts(), options, loss="mse")
        problem = formulate(measurement, {"bytes": 0.6})
        families.append(solve(problem, "brute-force").objective)
    joint = formulate(measure(bag(), texts(), JOINT, loss="mse"), {"bytes": 0.6})
    assert solve(joint, "brute-force").objective <= min(families) * (1 + 1e-6)  # effects are measured in float32


def test_blocks_can_be_fine_tuned(tmp_path: Path) -> None:
    model, data = bag(), texts()
    measurement = measure(model, data, RANKS.then(CODES), loss="mse")
    small = apply(model, measurement, solution([len(own) - 1 for own in measurement.transforms[:3]] + [0]))
    tuned = finetune(small, data, 30, teacher=model, loss="mse")
    assert mean_loss(model, tuned, data, loss="mse") < mean_loss(model, small, data, loss="mse")
    saved = save_compressed(tuned, tmp_path / "tuned.safetensors")
    assert saved.payload_bytes == save_compressed(small, tmp_path / "small.safetensors").payload_bytes
    assert torch.equal(load_compressed(saved.path, bag)(data[0]), tuned(data[0]))


def test_a_split_layer_keeps_its_hooks_and_what_refers_to_it() -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(20, 6)), torch.randint(20, (3, 5))
    model[0].register_forward_hook(lambda layer, given, output: 2 * output)
    model.order = [model[0]]  # type: ignore[assignment]
    expected = model(ids)
    split_vocabulary_(model, "0", vocabulary_blocks(torch.arange(20), 2))
    assert model.order == [model[0]]
    torch.testing.assert_close(model(ids), expected)
    fold_(model)
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]
    assert not list(model.buffers())
    torch.testing.assert_close(model(ids), expected)


def test_what_stands_for_an_embedding_takes_its_words_by_the_same_keyword() -> None:
    torch.manual_seed(0)
    embedding, ids = nn.Embedding(20, 6), torch.randint(20, (3, 5))
    model = nn.Sequential(copy.deepcopy(embedding))
    split = split_vocabulary_(model, "0", vocabulary_blocks(torch.arange(20), 2))[0]
    torch.testing.assert_close(split(input=ids), embedding(input=ids))
    whole = factored(embedding, {"basis": torch.eye(6), "codes": embedding.weight.detach()})
    torch.testing.assert_close(whole(input=ids), embedding(input=ids))
