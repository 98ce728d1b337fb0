"""The engine llama.cpp: any architecture it knows, any choice of types: as the emulation, in the predicted bytes."""

import random
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import qcompress
from qcompress.budgets import FILE_BYTES
from qcompress.engines.legal import for_engine
from qcompress.engines.llama_cpp.container import TensorPlan, Value, write
from qcompress.engines.llama_cpp.content import entries
from qcompress.engines.llama_cpp.engine import LlamaCpp
from qcompress.engines.llama_cpp.header import header_of
from qcompress.engines.llama_cpp.reading import read_gguf
from qcompress.engines.llama_cpp.tokenizer import tokenizer_values
from qcompress.engines.verify import checked
from qcompress.errors import DataError, EngineError
from qcompress.options import gguf_types
from qcompress.transforms.ggml.types import TYPES
from solvers import solve
from tests.engines.random_models import random_choice
from tests.engines.tiny import KINDS, any_tiny, tiny, words
from tests.measurements import measured, solution
from tests.quick import slow_but

ENGINE = LlamaCpp(threads=1)
TYPE_NAMES = [name for name in TYPES if name != "F32"]


@pytest.fixture
def llama(tmp_path):
    return tiny("llama", tmp_path / "model")


def any_choice(model, seed, options=None):
    """The model with a random legal type in every part."""
    sizes = measured_sizes(model, options)
    draw = np.random.default_rng(seed)
    choice = [int(draw.integers(len(options))) for options in sizes.transforms]
    return qcompress.apply(model, sizes, solution(choice)), sizes, choice


def assert_same_but_for_shifted_norms(found, wanted):
    """Equal weights; norms that a file holds with 1 added come back up to that sum's rounding."""
    state = found.state_dict()
    for name, tensor in wanted.state_dict().items():
        if "pooler" not in name:  # which llama.cpp has no use for
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=2e-7 if "norm" in name else 0)


def test_a_file_of_quantized_tensors_is_read_as_the_emulation(llama, tmp_path):
    smaller, _, _ = any_choice(llama, seed=5, options=gguf_types(("Q4_0", "Q5_1", "IQ4_XS", "F16")))
    path = qcompress.export(smaller, tmp_path / "small.gguf", target=ENGINE).path
    state = read_gguf(path).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in smaller.state_dict().items())


def test_files_that_cannot_be_read_say_why(llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        read_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(EngineError, match="is a folder; name a GGUF file"):
        read_gguf(tmp_path)
    (tmp_path / "text.gguf").write_text("not one")
    with pytest.raises(EngineError, match="is not a GGUF file"):
        read_gguf(tmp_path / "text.gguf")
    header = header_of(llama, "")
    plans = [entry.plan for entry in entries(llama, header)]
    write(tmp_path / "less.gguf", header.values, [plan for plan in plans if plan.name != "blk.0.ffn_up.weight"])
    with pytest.raises(EngineError, match=r"lacks 'blk.0.ffn_up.weight'"):
        read_gguf(tmp_path / "less.gguf")
    more = replace(plans[0], name="blk.0.surprise.weight")
    write(tmp_path / "more.gguf", header.values, [*plans, more])
    with pytest.raises(EngineError, match=r"has 'blk.0.surprise.weight', for which .* no place"):
        read_gguf(tmp_path / "more.gguf")


def one_run(seed, folder, choices=1):
    """A random model and choices, of ggml's encoders or ours, written and run."""
    rng = random.Random(seed)  # noqa: S311
    model = any_tiny(rng, folder / "model")
    engine = LlamaCpp(threads=1)
    compensated = rng.random() < 0.5
    options = gguf_types(rng.sample(TYPE_NAMES, 4), compensated=compensated)
    measurement = measured_on(model, {"input_ids": words(seed)}, options)
    smaller, predicted = model, None
    for _ in range(choices):
        if any(len(own) > 1 for own in measurement.transforms):  # else no row is a multiple of a block
            legal = for_engine(engine, model, measurement)
            choice = random_choice(engine, legal, rng)
            smaller = qcompress.apply(model, legal, solution(choice))
            predicted = qcompress.formulate(legal, {FILE_BYTES: 1.0}, pairs=False).evaluate(choice).usage[FILE_BYTES]
        file = qcompress.export(smaller, folder / "small.gguf", target=engine)
        assert predicted in (None, file.size_bytes), (file.size_bytes, predicted)
        _, _, wrong, _ = checked(engine, file.path, smaller, [words(seed, samples=1, length=rng.choice([1, 9]))])
        assert not wrong, wrong


@pytest.mark.parametrize("seed", range(3))
def test_a_random_model_runs_in_the_predicted_bytes(seed, tmp_path):
    one_run(seed, tmp_path)


def measured_sizes(model, options=None):
    batch = {"input_ids": words(0)}
    return for_engine(ENGINE, model, measured_on(model, batch, options or gguf_types()))


def measured_on(model, batch, options):
    forward = lambda model, batch: model(**batch)[0]  # noqa: E731
    return qcompress.measure(model, [batch], options, method="sampled", loss="mse", forward=forward)


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_runs_as_the_emulation(kind, tmp_path):
    model, data = tiny(kind, tmp_path / "model"), [words(1), words(2, samples=1, length=7)]
    path = qcompress.export(model, tmp_path / "whole.gguf", target=ENGINE).path
    whole = qcompress.verify(path, model, data, target=ENGINE)
    assert whole.ok, whole.why_not
    assert whole.max_difference < 0.01  # float32 in another order of sums
    again = read_gguf(path)
    assert_same_but_for_shifted_norms(again, model)
    torch.testing.assert_close(again(data[0])[0], model(data[0])[0], rtol=1e-4, atol=1e-5)
    copied = qcompress.export(again, tmp_path / "again.gguf", target=LlamaCpp(source=str(path))).path
    assert copied.read_bytes() == path.read_bytes()
    smaller, sizes, choice = any_choice(model, seed=3, options=gguf_types(("Q4_0", "Q5_1", "Q8_0", "Q4_K", "F16")))
    file = qcompress.export(smaller, tmp_path / "small.gguf", target=ENGINE)
    problem = qcompress.formulate(sizes, {FILE_BYTES: 1.0})
    assert file.size_bytes == problem.evaluate(choice).usage[FILE_BYTES]
    found = qcompress.verify(file.path, smaller, data, target=ENGINE)
    assert found.ok, found.why_not
    assert found.agreement >= 0.5


@pytest.mark.slow
def test_an_encoder_of_width_768_takes_k_types_and_gives_its_embeddings(tmp_path):
    shape = {"hidden_size": 768, "intermediate_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1}
    model = tiny("bert", tmp_path / "model", **shape)
    result = qcompress.compress(
        model, [{"input_ids": words(0, samples=8, length=16)}], budget={"file_bytes": "15%"},
        options=gguf_types(("Q3_K", "Q4_K", "Q6_K", "IQ4_XS")), method="sampled", loss="mse",
        forward=lambda model, batch: model(**batch)[0], target=ENGINE, output=tmp_path / "small.gguf", guard=False,
    )  # fmt: skip
    assert result.exported.size_bytes == result.solution.usage[FILE_BYTES] <= result.problem.budgets[FILE_BYTES]
    found = qcompress.verify(result.exported.path, result, [words(1), words(2, samples=1, length=7)], target=ENGINE)
    assert found.ok, found.why_not
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(result.exported.path).tensors}
    assert kinds & {"Q3_K", "Q4_K", "IQ4_XS"}


@pytest.mark.parametrize("seed", slow_but([0], range(3)))
def test_random_choices_of_all_types_are_read_bit_for_bit(llama, tmp_path, seed):
    smaller, _, _ = any_choice(llama, seed)
    path = qcompress.export(smaller, tmp_path / "small.gguf", target=ENGINE).path
    found = qcompress.verify(path, smaller, [words(seed)], target=ENGINE)
    assert found.ok, found.why_not


def test_a_solved_choice_is_within_the_budget_of_the_file(llama, tmp_path):
    sizes = measured_sizes(llama)
    problem = qcompress.formulate(sizes, {FILE_BYTES: 0.35}, pairs=False)
    found = solve(problem, "milp")
    smaller = qcompress.apply(llama, sizes, found)
    file = qcompress.export(smaller, tmp_path / "small.gguf", target=ENGINE)
    assert file.size_bytes == found.usage[FILE_BYTES] <= problem.budgets[FILE_BYTES]


def test_a_gguf_file_gives_its_head_to_another(llama, tmp_path):
    first = qcompress.export(llama, tmp_path / "first.gguf", target=ENGINE).path
    second = qcompress.export(llama, tmp_path / "second.gguf", target=LlamaCpp(source=str(first), threads=1)).path
    assert first.read_bytes() == second.read_bytes()


def test_a_weight_that_is_not_the_models_is_found_out(llama, tmp_path):
    path = qcompress.export(llama, tmp_path / "whole.gguf", target=ENGINE).path
    with torch.no_grad():
        llama.model.layers[1].self_attn.k_proj.weight[3, 5] += 0.25
    found = qcompress.verify(path, llama, [words(0)], target=ENGINE)
    assert not found.ok
    assert (
        found.why_not == "'blk.1.attn_k.weight' in the file is not the model's 'model.layers.1.self_attn.k_proj.weight'"
    )


def test_the_recipe_names_every_tensor_and_its_type(llama, tmp_path):
    smaller, _, _ = any_choice(llama, seed=1)
    engine = LlamaCpp(recipe=str(tmp_path / "types.txt"), threads=1)
    path = qcompress.export(smaller, tmp_path / "small.gguf", target=engine).path
    lines = (tmp_path / "types.txt").read_text().splitlines()
    told = {line.partition("=")[0]: line.partition("=")[2] for line in lines}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1}
    assert {
        f"^{name.replace('.', chr(92) + '.')}$": tensor.tensor_type.name.lower() for name, tensor in tensors.items()
    } == told


def test_words_and_their_pairs_are_taken_over(llama, tmp_path):
    path = qcompress.export(llama, tmp_path / "whole.gguf", target=ENGINE).path
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == llama.config.vocab_size
    assert tokens[:3] == ["<pad>", "<s>", "</s>"]
    assert fields["tokenizer.ggml.merges"].contents() == ["t h", "th e", "a n", "Ġ the"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"


def test_what_has_no_place_in_the_file_is_refused(llama, tmp_path):
    with pytest.raises(
        EngineError, match=r"runs language models and text encoders \(llama, .*give a GGUF file of the same"
    ):
        qcompress.export(nn.Sequential(nn.Linear(4, 4)), tmp_path / "x", target=ENGINE)
    with pytest.raises(EngineError, match="there is no tokenizer.json in"):
        qcompress.export(llama, tmp_path / "x", target=LlamaCpp(source=str(tmp_path)))
    llama.extra = nn.Linear(4, 4)
    with pytest.raises(EngineError, match=r"no place for 'extra.weight' .*\(nor for 1 others\)"):
        qcompress.export(llama, tmp_path / "x", target=ENGINE)
    del llama.extra
    llama.config.model_type = "surprise"
    with pytest.raises(EngineError, match="does not support models of type 'surprise'; known: llama"):
        qcompress.export(llama, tmp_path / "x", target=ENGINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_other_ways_to_store_a_part_are_refused(llama):
    batch = {"input_ids": words(0)}
    with pytest.raises(EngineError, match="runs ggml's types, not '4 bits'; offer gguf_types"):
        for_engine(ENGINE, llama, measured_on(llama, batch, qcompress.prune_quantize(bits=(4,), sparsity=(0,))))


def test_blocks_of_one_tensor_are_refused():
    model = nn.Sequential(nn.Linear(32, 8))
    part = measured(model, torch.ones(1, 32), gguf_types(("Q4_0",)), granularity=4)
    assert "one type" in ENGINE.refuse(part.parts[0], part.transforms[0][1])


def test_a_file_that_is_none_is_refused(llama, tmp_path):
    (tmp_path / "not.gguf").write_bytes(b"something else entirely, and long enough")
    with pytest.raises(EngineError, match="is not a GGUF file"):
        qcompress.export(llama, tmp_path / "x", target=LlamaCpp(source=str(tmp_path / "not.gguf")))


def test_batches_without_word_numbers_are_refused(llama, tmp_path):
    path = qcompress.export(llama, tmp_path / "whole.gguf", target=ENGINE).path
    with pytest.raises(DataError, match="takes token ids"):
        qcompress.verify(path, llama, [torch.ones(2, 3)], target=ENGINE)


def test_rules_of_splitting_without_a_name_are_refused(tmp_path, llama):
    import json

    folder = tmp_path / "model"
    told = json.loads((folder / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(EngineError, match="rules by which the tokenizer splits text are not supported"):
        tokenizer_values(folder, llama.config)


def test_gguf_reads_the_container_that_is_written(tmp_path):
    rng = np.random.default_rng(0)
    matrix, vector = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    plans = [
        TensorPlan(name="a", shape=(3, 8), number=0, size_bytes=96, content=lambda: matrix),
        TensorPlan(name="b", shape=(5,), number=0, size_bytes=20, content=lambda: vector),
    ]
    told = {"general.architecture": "llama", "x.number": 7, "x.share": 0.5, "x.flag": True, "x.names": ["ä", "b"],
            "x.sizes": [1, 2, 3]}  # fmt: skip
    write(tmp_path / "file.gguf", {name: Value.of(value) for name, value in told.items()}, plans)
    reader = gguf.GGUFReader(tmp_path / "file.gguf")
    assert {name: reader.fields[name].contents() for name in told} == told
    for tensor, values in zip(reader.tensors, (matrix, vector), strict=True):
        assert np.array_equal(tensor.data, values)
    assert (tmp_path / "file.gguf").stat().st_size % 32 == 0


def test_a_tensor_of_another_size_than_planned_is_refused(tmp_path):
    plan = TensorPlan(name="a", shape=(4,), number=0, size_bytes=16, content=lambda: np.zeros(3, np.float32))
    with pytest.raises(EngineError, match="takes 12 bytes, planned 16"):
        write(tmp_path / "file.gguf", {}, [plan])
