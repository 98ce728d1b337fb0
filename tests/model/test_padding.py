"""Padded positions count in nothing: a padded batch measures the same as its samples alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qcompress
from qcompress.agreement import agreement
from qcompress.errors import DataError
from qcompress.guard import KeptLoss
from qcompress.measuring.inputs.ranges import activation_ranges
from qcompress.measuring.true_loss import mean_loss
from qcompress.model.losses import as_loss
from qcompress.model.padding import real_inputs, real_positions
from qcompress.opened_guard import OpenedKeptLoss
from qcompress.proposals import Proposal
from tests.models import seeded
from tests.opened_models import in_memory, saved, tokens

LENGTHS = (3, 7, 5, 7)
WORDS = 11


class Words(nn.Module):
    """Scores of words from a word and the mean of the real words; padded positions have outputs as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, 16), nn.Linear(16, WORDS)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        words, real = self.embed(input_ids), attention_mask[..., None].to(self.embed.weight.dtype)
        mean = (words * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return self.head(torch.relu(self.inner(words + mean)))


def batches(
    *, left: bool = False, lengths: tuple[int, ...] = LENGTHS
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Samples of several lengths, each alone and all padded to one batch."""
    generator = torch.Generator().manual_seed(0)
    alone, padded = [], []
    for length in lengths:
        ids = torch.randint(1, WORDS, (1, length), generator=generator)
        alone.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        sides = (max(lengths) - length, 0) if left else (0, max(lengths) - length)
        padded.append({name: nn.functional.pad(value, sides) for name, value in alone[-1].items()})
    return alone, {name: torch.cat([sample[name] for sample in padded]) for name in padded[0]}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("loss", ["kl", "mse", "kl-tail"])
def test_a_padded_batch_measures_the_same_as_its_samples_alone(loss: str, left: bool) -> None:
    model = seeded(Words)
    options = qcompress.prune_quantize(bits=(2, 4), sparsity=(0,), compensated=True)
    alone, padded = batches(left=left)
    apart = qcompress.measure(model, alone, options, loss=loss, method="direct")
    together = qcompress.measure(model, [padded], options, loss=loss, method="direct")
    np.testing.assert_allclose(together.cost, apart.cost, rtol=1e-4, atol=1e-9)  # sums of float32 in another order
    np.testing.assert_allclose(together.error, apart.error, rtol=1e-4, atol=1e-7)
    assert together.num_inputs == apart.num_inputs
    assert together.num_samples == apart.num_samples == len(LENGTHS)
    smaller = qcompress.apply(model, apart, qcompress.solve(qcompress.formulate(apart, {"bytes": 0.25}), "greedy"))
    assert mean_loss(model, smaller, [padded], loss=loss) == pytest.approx(
        mean_loss(model, smaller, alone, loss=loss), rel=1e-5
    )
    found, expected = agreement(model, smaller, [padded]), agreement(model, smaller, alone)
    assert found.samples == expected.samples == sum(LENGTHS)
    assert found.changed == expected.changed


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["kl", "kl:-1", "kl:2", "mse", "kl-tail:1"]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    softened=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_part_of_a_loss_leaves_padded_positions_out(
    name: str, lengths: list[int], softened: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    loss = as_loss(name)
    loss = loss.softened if softened and loss.softened is not None else loss
    mask = torch.zeros(len(lengths), max(lengths))
    for row, length in zip(mask, lengths, strict=True):
        row[torch.randperm(max(lengths))[:length]] = 1
    before, after = (torch.randn(*mask.shape, 5, dtype=torch.float64) for _ in range(2))
    batch = {"attention_mask": mask.long()}
    rise, effects = loss.rise(after, before, batch), loss.effects((after - before)[None], before, batch)[0]
    by_position = loss.rise_by_position(after, before, batch)
    gradient = loss.gradient(after, batch, before)
    assert gradient is not None
    probe = loss.probe(before, batch, torch.Generator().manual_seed(0))
    probes = loss.probes(before, batch, torch.Generator().manual_seed(0))
    for index, row in enumerate(mask.bool()):
        own = before[index, row][None], after[index, row][None]
        torch.testing.assert_close(rise[index], loss.rise(own[1], own[0], None)[0])
        torch.testing.assert_close(by_position[index].mean(), rise[index])
        alone = loss.effects((own[1] - own[0])[None], own[0], None)
        torch.testing.assert_close(effects[index].square().sum(), alone.square().sum())
        own_gradient = loss.gradient(own[1], None, own[0])
        assert own_gradient is not None
        torch.testing.assert_close(gradient[index, row], own_gradient[0])
        for padded in (gradient[index, ~row], effects[index, ~row], probe[index, ~row], probes[:, index, ~row]):
            assert not padded.any()


def test_an_opened_model_leaves_padded_positions_out_as_one_in_memory_does(tmp_path: Path) -> None:
    folder = saved("Llama", tmp_path)
    model, ids = in_memory(folder), tokens(6, 9)
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    data = [{"input_ids": ids, "attention_mask": mask}]
    options = qcompress.prune_quantize(bits=(3,), sparsity=(0,), compensated=True)
    near = qcompress.measure(model, data, options, method="sampled")
    opened = qcompress.measure(qcompress.open_model(folder), data, options, method="sampled")
    np.testing.assert_allclose(opened.error, near.error, rtol=1e-5)
    np.testing.assert_allclose(opened.cost, near.cost, rtol=1e-4)
    ids[::2, 5:] = 7  # other words at padded positions
    other = qcompress.measure(qcompress.open_model(folder), data, options, method="sampled")
    np.testing.assert_allclose(other.error, opened.error, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "OPT"])
def test_a_padding_word_without_gradient_is_no_wrong_gradient(kind: str, tmp_path: Path) -> None:
    more = {"OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 16}}.get(kind, {})
    folder, ids = saved(kind, tmp_path, pad_token_id=0, **more), tokens(4, 8).clamp(min=1)
    mask = torch.ones_like(ids)
    mask[0, 2:] = ids[0, 2:] = 0
    data, options = [{"input_ids": ids, "attention_mask": mask}], qcompress.prune_quantize(bits=(3,), sparsity=(0,))
    near = qcompress.measure(in_memory(folder), data, options, method="sampled")
    opened = qcompress.measure(qcompress.open_model(folder), data, options, method="sampled")
    assert not near.tried
    assert not opened.no_choice
    assert opened.labels == near.labels
    np.testing.assert_allclose(opened.cost, near.cost, rtol=1e-4)


def test_a_padding_word_that_is_meant_has_a_wrong_gradient_and_an_opened_model_says_so(tmp_path: Path) -> None:
    folder, ids = saved("Llama", tmp_path, pad_token_id=0), tokens(4, 8).clamp(min=1)
    ids[0, 2:4] = 0  # the forward pass uses its row, which gets no gradient
    data, options = [{"input_ids": ids}], qcompress.prune_quantize(bits=(3,), sparsity=(0,))
    near = qcompress.measure(in_memory(folder), data, options, method="sampled")
    opened = qcompress.measure(qcompress.open_model(folder), data, options, method="sampled")
    assert near.tried == {"model.embed_tokens": "the outputs do not follow its gradient"}
    told = {item.name: item.reason for item in opened.unchanged}
    assert told["model.embed_tokens"].startswith("the outputs do not follow its gradient")


def test_layers_of_other_packages_and_ranges_of_activations_leave_padded_positions_out(tmp_path: Path) -> None:
    model, ids = in_memory(saved("GPT2", tmp_path)), tokens(4, 7)
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in LENGTHS])
    alone = [
        {"input_ids": ids[index : index + 1, :length], "attention_mask": mask[index : index + 1, :length]}
        for index, length in enumerate(LENGTHS)
    ]
    for options in (
        qcompress.prune_quantize(bits=(3,), sparsity=(0,), compensated=True),
        qcompress.integer_products(bits=(8,)),
    ):
        only = "transformer.h.*"  # each position embedding counts once, however long the samples are
        apart = qcompress.measure(model, alone, options, only=only, method="direct")
        together = qcompress.measure(
            model, [{"input_ids": ids, "attention_mask": mask}], options, only=only, method="direct"
        )
        assert together.num_inputs == apart.num_inputs
        np.testing.assert_allclose(together.error, apart.error, rtol=1e-3)
        np.testing.assert_allclose(together.cost, apart.cost, rtol=0.02, atol=1e-2 * apart.cost.max())  # small changes


def test_layers_that_are_given_flattened_rows_leave_padded_positions_out(tmp_path: Path) -> None:
    more = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 16, "pad_token_id": 0}
    model, ids = in_memory(saved("OPT", tmp_path, **more)), tokens(4, 7).clamp(min=1)
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in LENGTHS])
    together = [{"input_ids": ids * mask, "attention_mask": mask}]
    alone = [
        {"input_ids": ids[index : index + 1, :length], "attention_mask": mask[index : index + 1, :length]}
        for index, length in enumerate(LENGTHS)
    ]
    options, only = qcompress.prune_quantize(bits=(3,), sparsity=(0,), compensated=True), "*.fc?"
    found, expected = (
        qcompress.measure(model, data, options, only=only, method="sampled") for data in (together, alone)
    )
    assert found.num_inputs == expected.num_inputs == dict.fromkeys(found.num_inputs, sum(LENGTHS))
    assert len(found.num_inputs) == 6
    np.testing.assert_allclose(found.error, expected.error, rtol=1e-4)
    np.testing.assert_allclose(
        [ends for of_layer in activation_ranges(model, found.parts, together, None).values() for ends in of_layer],
        [ends for of_layer in activation_ranges(model, found.parts, alone, None).values() for ends in of_layer],
        rtol=1e-4,
    )


def test_layers_are_fitted_in_turn_to_real_positions_alone() -> None:
    model, (alone, padded) = seeded(Words), batches(lengths=(3, 7, 5, 7, 6, 2, 7, 4))
    measurement = qcompress.measure(model, alone, qcompress.prune_channels(keep=(0.5,)))
    solution = qcompress.solve(qcompress.formulate(measurement, {"bytes": 0.8}), "greedy")
    for data in (alone, [padded]), ([padded, padded], [*alone, *alone]):
        first, second = (
            qcompress.fit_in_turn_(qcompress.apply(model, measurement, solution), model, own) for own in data
        )
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_an_encoder_with_a_decoder_has_its_outputs_where_the_decoder_has_words() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"attention_mask": mask, "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}
    assert real_positions(batch, torch.zeros(2, 3, 5)) is None
    assert real_inputs(batch, nn.Linear(5, 5), torch.zeros(2, 3, 5)) is None
    other = torch.tensor([[1, 0, 0], [1, 1, 1]])
    real = real_positions({**batch, "decoder_attention_mask": other}, torch.zeros(2, 3, 5))
    assert real is not None
    assert real.tolist() == other.bool().tolist()


def translator() -> nn.Module:
    """An encoder and a decoder, which makes its inputs from labels where it is given none."""
    import transformers

    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, pad_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    return seeded(lambda: transformers.T5ForConditionalGeneration(config)).eval()


def pairs() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Texts with labels, each alone and all padded to one batch, in which both sides are equally long."""
    generator = torch.Generator().manual_seed(0)
    alone, padded = [], []
    for length, wanted in ((3, 7), (7, 4), (5, 7)):
        ids, labels = (torch.randint(3, 40, (1, size), generator=generator) for size in (length, wanted))
        alone.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        sides = {name: (0, 7 - value.shape[1]) for name, value in alone[-1].items()}
        fills = {"labels": -100}
        padded.append(
            {name: nn.functional.pad(value, sides[name], value=fills.get(name, 0)) for name, value in alone[-1].items()}
        )
    return alone, {name: torch.cat([sample[name] for sample in padded]) for name in padded[0]}


def test_labels_of_a_decoder_whose_padding_is_not_told_are_refused() -> None:
    model, (alone, padded) = translator(), pairs()
    options, skip = qcompress.prune_quantize(bits=(3,), sparsity=(0,)), "shared"
    with pytest.raises(DataError, match=r"add decoder_attention_mask=\(labels != -100\)"):
        qcompress.measure(model, [alone[0], padded], options)
    with pytest.raises(DataError, match="decoder_attention_mask"):
        mean_loss(model, model, [padded], loss="kl")
    expected = qcompress.measure(model, alone, options, skip=skip, method="direct")  # no padding, nothing to tell
    mask = (padded["labels"] != -100).long()
    made = model.prepare_decoder_input_ids_from_labels(padded["labels"])  # type: ignore[operator]
    rest = {name: value for name, value in padded.items() if name != "labels"}
    for told in ({**padded, "decoder_attention_mask": mask},
                 {**rest, "decoder_input_ids": made, "decoder_attention_mask": mask}):  # fmt: skip
        found = qcompress.measure(model, [told], options, skip=skip, method="direct")
        np.testing.assert_allclose(found.cost, expected.cost, rtol=1e-3, atol=1e-9)


def test_labels_of_classes_and_of_models_without_a_decoder_say_nothing_of_padding() -> None:
    from qcompress.model.decoder_inputs import require_decoder_mask

    model, (_, padded) = translator(), pairs()
    require_decoder_mask(nn.Linear(2, 2), padded)
    require_decoder_mask(model, {**padded, "labels": torch.zeros(3, dtype=torch.long)})
    require_decoder_mask(model, [padded["input_ids"], padded["labels"]])


def test_a_sample_that_is_all_padding_is_refused() -> None:
    _, padded = batches()
    empty = {name: torch.cat([value, torch.zeros_like(value[:1])]) for name, value in padded.items()}
    with pytest.raises(DataError, match="sample 4 of a batch is all padding"):
        as_loss("kl").rise(torch.zeros(5, 7, WORDS), torch.zeros(5, 7, WORDS), empty)
    model = nn.Sequential(nn.Embedding(WORDS, 4))
    with pytest.raises(DataError, match="sample 4 of batch 0 of data, counted from 0, is all padding"):
        qcompress.measure(
            model,
            [empty],
            qcompress.prune_quantize(bits=(4,)),
            loss="mse",
            forward=lambda model, batch: model(batch["input_ids"]),
        )


def test_only_what_has_positions_is_padded() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"attention_mask": mask}
    assert real_positions(batch, torch.zeros(2, 3)) is None  # three features, not three positions
    assert real_positions(batch, torch.zeros(2, 4, 3)) is None
    assert real_positions({"attention_mask": torch.ones(2, 3)}, torch.zeros(2, 3, 5)) is None
    assert real_positions({"attention_mask": -1e9 * (1.0 - mask)}, torch.zeros(2, 3, 5)) is None  # added to scores
    assert real_positions([mask], torch.zeros(2, 3, 5)) is None
    assert real_inputs(batch, nn.Linear(5, 5), torch.zeros(2, 3, 4, 5)) is None  # three heads
    assert real_inputs(batch, nn.Linear(5, 5), torch.zeros(2, 5)) is None  # one row per sample
    single = {"attention_mask": torch.tensor([[1], [1]])}
    assert real_inputs(single, nn.Linear(5, 5), torch.zeros(2, 5)) is None
    flattened = (
        (nn.Linear(5, 5), torch.zeros(6, 5)),
        (nn.Linear(5, 5), torch.zeros(5, 6).t()),
        (nn.Embedding(9, 2), torch.zeros(6, dtype=torch.long)),
    )
    for layer, flat in flattened:
        rows = real_inputs(batch, layer, flat)
        assert rows is not None
        assert rows.tolist() == mask.flatten().bool().tolist()
    assert real_inputs(batch, nn.Conv1d(3, 5, 1), torch.zeros(2, 3, 5)) is None  # three channels
    real = real_inputs(batch, nn.Embedding(9, 2), torch.zeros(2, 3, dtype=torch.long))
    assert real is not None
    assert real.tolist() == mask.bool().tolist()
    for name in ("kl:1", "kl:-2"):  # classes are in the middle
        changes = torch.randn(2, 3, 3)
        loss = as_loss(name)
        torch.testing.assert_close(loss.rise(changes, 0 * changes, batch), loss.rise(changes, 0 * changes, None))


def test_a_sample_that_is_all_padding_is_named_with_its_batch(tmp_path: Path) -> None:
    """Also where a pass is over one sample of the batch."""
    folder = saved("Llama", tmp_path)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[2, 3:] = mask[3] = 0
    batches = [tokens(2, 6), {"input_ids": tokens(4, 6), "attention_mask": mask}]
    options, message = (
        qcompress.prune_quantize(bits=(4,)),
        "sample 3 of batch 1 of data, counted from 0, is all padding",
    )
    opened, whole = qcompress.open_model(folder), in_memory(folder)
    for model, methods in ((opened, ["sampled"]), (whole, ["sampled", "fisher", "direct"])):
        with pytest.raises(DataError, match=message):
            qcompress.mean_loss(model, model, batches)
        for method in methods:
            with pytest.raises(DataError, match=message):
                qcompress.measure(model, batches, options, method=method, only="lm_head")
    measurement = qcompress.measure(opened, batches[:1], options, method="sampled", only="lm_head")
    proposal = Proposal(name="all kept", choice=np.zeros(1, dtype=int))
    loss = as_loss("kl")
    with pytest.raises(DataError, match=message):
        OpenedKeptLoss(opened, measurement, batches, batches[:1], loss=loss)(proposal)
    with pytest.raises(DataError, match=message):
        KeptLoss(whole, measurement, batches, loss=loss)(proposal)
    for words, said in (
        ({"data": batches}, message),
        ({"data": batches[:1], "validation": batches}, "1 of validation,"),
    ):
        with pytest.raises(DataError, match=said):
            qcompress.compress(whole, budget={"bytes": 0.9}, options=options, **words)
