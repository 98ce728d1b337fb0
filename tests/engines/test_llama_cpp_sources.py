"""Where the header of a GGUF file comes from: the right folder or file, its pooling, and files that are damaged."""

import json
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import nn

import qcompress
from qcompress.engines.llama_cpp import running
from qcompress.engines.llama_cpp.container import TensorPlan, Value, write
from qcompress.engines.llama_cpp.content import entries
from qcompress.engines.llama_cpp.engine import LlamaCpp
from qcompress.engines.llama_cpp.header import header_of
from qcompress.engines.llama_cpp.pooling import pooling_type
from qcompress.engines.llama_cpp.reading import read_gguf
from qcompress.errors import DataError, EngineError
from tests.engines.tiny import KINDS, tiny, words

ENGINE = LlamaCpp(threads=1)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def llama(tmp_path):
    return tiny("llama", tmp_path / "model")


def written(model, path, changes=(), extra=()):
    """The GGUF file of a model with some values of the header changed and tensors added."""
    header = header_of(model, "")
    values = header.values | {name: Value.of(value) for name, value in dict(changes).items()}
    write(path, values, [*(entry.plan for entry in entries(model, header)), *extra])
    return path


PARTS = {  # changes of the header, and how many tensors are left out
    "vocabulary": ({}, None, "holds only a vocabulary and no weights: give the file with"),
    "adapter": ({"general.type": "adapter"}, 1, r"is an adapter \(LoRA\), no model: merge it"),
    "first part": ({"split.no": 0, "split.count": 2}, -3, "is part 1 of 2 of a model: merge them"),
    "second part": ({"split.no": 1, "split.count": 2}, 3, "is part 2 of 2 of a model: merge them"),
    "projector": ({}, 1, "lacks 'token_embd.weight', so it is not a language model"),
}


@pytest.mark.parametrize(("changes", "place", "named"), PARTS.values(), ids=list(PARTS))
def test_a_file_that_is_no_whole_model_says_what_it_is(llama, changes, place, named, tmp_path):
    header = header_of(llama, "")
    plans = [entry.plan for entry in entries(llama, header)]
    kept = [] if place is None else plans[place:] if place > 0 else plans[:place]
    path = tmp_path / "part.gguf"
    write(path, header.values | {name: Value.of(value) for name, value in changes.items()}, kept)
    with pytest.raises(EngineError, match=f"part.gguf {named}"):
        read_gguf(path)
    with pytest.raises(EngineError, match=f"part.gguf {named}"):
        qcompress.verify(path, llama, [words(0)], target=ENGINE)


@pytest.mark.parametrize("name", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_sizes_by_layer_are_refused_by_name(llama, name, tmp_path):
    path = written(llama, tmp_path / "by_layer.gguf", {f"llama.{name}": [4, 2]})
    with pytest.raises(EngineError, match=rf"llama\.{name} by layer, \[4, 2\]; only models whose layers"):
        read_gguf(path)


@pytest.mark.parametrize("name", ["block_count", "embedding_length", "attention.head_count", "feed_forward_length"])
def test_a_header_without_a_size_is_refused_by_name(llama, name, tmp_path):
    header = header_of(llama, "")
    values = {key: value for key, value in header.values.items() if key != f"llama.{name}"}
    write(tmp_path / "a.gguf", values, [entry.plan for entry in entries(llama, header)])
    with pytest.raises(EngineError, match=rf"lacks llama\.{name}"):
        read_gguf(tmp_path / "a.gguf")


def test_a_file_without_a_tokenizer_is_told(llama, tmp_path):
    header = header_of(llama, "")
    values = {key: value for key, value in header.values.items() if not key.startswith("tokenizer.")}
    write(tmp_path / "a.gguf", values, [entry.plan for entry in entries(llama, header)])
    with pytest.raises(EngineError, match=r"a\.gguf lacks tokenizer\.ggml\.tokens"):
        qcompress.verify(tmp_path / "a.gguf", llama, [words(0)], target=ENGINE)


def factors(name, values):
    content = np.array(values, np.float32)
    return TensorPlan(name=name, shape=content.shape, number=0, size_bytes=content.nbytes, content=lambda: content)


def with_pooling(folder, settings, *modules):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    kinds = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling", *modules]
    paths = ["", "1_Pooling", "2"]
    (folder / "modules.json").write_text(
        json.dumps([{"path": path, "type": kind} for path, kind in zip(paths, kinds, strict=False)])
    )


@pytest.mark.parametrize(("settings", "number"), [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, 2),
    ({"pooling_mode_mean_tokens": True, "include_prompt": True}, 1),
    ({"pooling_mode_lasttoken": True}, 3),
    ({"pooling_mode": "cls"}, 2),
])  # fmt: skip
def test_an_encoder_pools_as_its_folder_says(settings, number, tmp_path):
    model, data = tiny("bert", tmp_path / "model"), [words(1), words(2, samples=1, length=7)]
    with_pooling(tmp_path / "model", settings, "sentence_transformers.models.Normalize")
    path = qcompress.export(model, tmp_path / "whole.gguf", target=ENGINE).path
    assert gguf.GGUFReader(path).fields["bert.pooling_type"].contents() == number
    for engine in (ENGINE, LlamaCpp(source=str(path), threads=1)):
        found = qcompress.verify(path, model, data, target=engine)
        assert found.ok, found.why_not
        assert found.max_difference < 0.01
    states = model(data[1])[0][0]
    wanted = {1: states.mean(0), 2: states[0], 3: states[-1]}[number]
    outputs = running.run(path, data, 1).outputs[1][0]
    torch.testing.assert_close(outputs, wanted / wanted.norm(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("settings", "modules", "named"), [
    ({"pooling_mode_max_tokens": True}, (), "asks for the pooling max, but .* one of mean, cls, lasttoken"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, (), "the pooling cls and mean"),
    ({"pooling_mode_mean_sqrt_len_tokens": True}, (), "the pooling mean_sqrt_len"),
    ({}, (), "the pooling none"),
    ({"pooling_mode_mean_tokens": True}, ("sentence_transformers.models.Dense",), "a module 'Dense'"),
])  # fmt: skip
def test_other_poolings_are_refused(settings, modules, named, tmp_path):
    with_pooling(tmp_path, settings, *modules)
    with pytest.raises(EngineError, match=named):
        pooling_type(tmp_path)


def test_a_file_without_a_known_pooling_is_refused_as_source(tmp_path):
    model = tiny("bert", tmp_path / "model")
    path = written(model, tmp_path / "ranks.gguf", {"bert.pooling_type": 4})
    with pytest.raises(EngineError, match="has the pooling type 4; known"):
        qcompress.export(model, tmp_path / "x.gguf", target=LlamaCpp(source=str(path)))


def test_a_model_made_in_memory_does_not_take_a_tokenizer_that_lies_around(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "model")
    made = transformers.AutoModelForCausalLM.from_config(llama.config.__class__(**KINDS["llama"]))
    with pytest.raises(EngineError, match="was not loaded from a folder, where its tokenizer would be: give"):
        qcompress.export(made, tmp_path / "x.gguf", target=ENGINE)
    assert qcompress.export(made, tmp_path / "x.gguf", target=LlamaCpp(source=".")).size_bytes > 0


def test_a_place_that_does_not_exist_is_said_to_be_missing(llama, tmp_path):
    with pytest.raises(EngineError, match="there is no folder or GGUF file '/nonexistent'"):
        qcompress.export(llama, tmp_path / "x.gguf", target=LlamaCpp(source="/nonexistent"))
    llama.name_or_path = llama.config._name_or_path = "someone/their-model"
    with pytest.raises(EngineError, match="was loaded from 'someone/their-model', which is not a folder here: give"):
        qcompress.export(llama, tmp_path / "x.gguf", target=ENGINE)


@pytest.mark.parametrize(("kind", "changes", "named"), [
    ("llama", {"intermediate_size": 128}, "llama.feed_forward_length is 256, but the model has 128"),
    ("llama", {"num_hidden_layers": 1}, "llama.block_count is 2, but the model has 1"),
    ("llama", {"num_hidden_layers": 3}, "llama.block_count is 2, but the model has 3"),
    ("llama", {"num_key_value_heads": 4}, "llama.attention.head_count_kv is 2, but the model has 4"),
    ("llama", {"rms_norm_eps": 1e-3}, "llama.attention.layer_norm_rms_epsilon is 9.99.*e-07, but the model has 0.001"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "llama.rope.freq_base is 10000.0"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "scaling.type is 'none'"),
    ("llama", {"vocab_size": 300}, r"says \(320, 64\) for 'token_embd.weight'"),
    ("qwen2", {}, "a model of architecture 'llama', but the model's is 'qwen2'"),
])  # fmt: skip
def test_a_file_of_another_model_is_refused_as_source(llama, kind, changes, named, tmp_path):
    path = written(llama, tmp_path / "first.gguf")
    other = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **(KINDS[kind] | changes))
    )
    with pytest.raises(EngineError, match=named):
        LlamaCpp(source=str(path)).sizes(other, (), ())


def test_a_model_without_configuration_must_fit_the_header(llama, tmp_path):
    path = written(llama, tmp_path / "first.gguf")
    for changes, named in (({"intermediate_size": 128}, r"says \(64, 256\) for 'blk.0.ffn_down.weight'"),
                           ({"num_hidden_layers": 1}, "says 2 blocks, but the model has 1")):  # fmt: skip
        other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(KINDS["llama"] | changes)))
        bare = nn.Module()
        bare.model = other.model
        with pytest.raises(EngineError, match=named):
            LlamaCpp(source=str(path)).sizes(bare, (), ())


def test_factors_of_a_rotation_must_be_those_of_the_model(tmp_path):
    """The header of Llama 3.1 and later has no type of scaling, but a tensor of factors."""
    model = tiny("llama", tmp_path / "model", rope_parameters=LLAMA3)
    plain = tiny("llama", tmp_path / "plain")
    base = 1e4 ** (-np.arange(8) / 8)
    right = factors("rope_freqs.weight", base / model.model.rotary_emb.inv_freq.numpy())
    path = written(plain, tmp_path / "right.gguf", extra=[right])
    engine, text = LlamaCpp(source=str(path), threads=1), words(3, samples=1, length=60)
    found = qcompress.verify(
        qcompress.export(model, tmp_path / "x.gguf", target=engine).path, model, [text], target=engine
    )
    assert found.ok, found.why_not
    assert found.max_difference < 0.01
    with pytest.raises(EngineError, match=r"has 'rope_freqs.weight', but .* of type 'default'"):
        header_of(plain, str(path))
    wrong = written(plain, tmp_path / "wrong.gguf", extra=[factors("rope_freqs.weight", np.ones(8))])
    with pytest.raises(EngineError, match="'rope_freqs.weight' is not what"):
        header_of(model, str(wrong))
    with pytest.raises(EngineError, match="lacks 'rope_freqs.weight', which .* of type 'llama3' need"):
        header_of(model, str(written(plain, tmp_path / "without.gguf")))
    own = header_of(model, "").tensors[0]
    assert (own.name, own.shape) == (right.name, right.shape)
    np.testing.assert_allclose(own.content(), right.content(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("original", [64, 8192])
def test_llama_3s_rotation_is_written_and_read(kind, original, tmp_path):
    """Read with the parameters of Llama 3.1 to 3.3, or not at all: others have the same factors."""
    rope = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": original}
    model, text = tiny(kind, tmp_path / "model", rope_parameters=rope), words(3, samples=1, length=60)
    path = qcompress.export(model, tmp_path / "x.gguf", target=ENGINE).path
    found = qcompress.verify(path, model, [text], target=ENGINE)
    assert found.ok, found.why_not
    assert found.max_difference < 0.01
    if original == 8192:
        assert read_gguf(path).config.rope_parameters == rope
        return
    with pytest.raises(EngineError, match=r"has 'rope_freqs.weight', factors of rotary positions.*LlamaCpp\(source="):
        read_gguf(path)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"])
def test_a_file_with_factors_of_a_rotation_is_not_read_without_them(llama, name, tmp_path):
    path = written(llama, tmp_path / "x.gguf", extra=[factors(name, [1, 1, 2, 4, 8, 8, 8, 8])])
    with pytest.raises(EngineError, match=rf"has '{name}', factors of rotary positions.*LlamaCpp\(source="):
        read_gguf(path)


@pytest.mark.parametrize(("changes", "named"), [
    ({"llama.rope.scaling.type": "longrope"}, "longrope is not known"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
      "llama.rope.scaling.original_context_length": 32, "llama.rope.scaling.attn_factor": 2.0},
     "attn_factor is not known"),
    ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor is not known"),
    ({"llama.rope.dimension_count": 8}, "rotates 8 of 16 dimensions"),
])  # fmt: skip
def test_a_rotation_that_is_not_known_is_not_read_as_another(llama, changes, named, tmp_path):
    path = written(llama, tmp_path / "x.gguf", changes)
    with pytest.raises(EngineError, match=named):
        read_gguf(path)
    if "llama.rope.dimension_count" not in changes:
        with pytest.raises(EngineError, match=named):
            header_of(llama, str(path))


def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(llama, tmp_path):
    text = words(3, samples=1, length=60)
    path = written(llama, tmp_path / "x.gguf", {"llama.rope.scaling.factor": 4.0})
    again = read_gguf(path)
    outputs = LlamaCpp(source=str(path)).emulate(again, [text]).outputs[0]
    torch.testing.assert_close(running.run(path, [text], 1).outputs[0], outputs, rtol=0, atol=0.02)
    with pytest.raises(EngineError, match=r"rope.scaling.type is 'linear', but the model has 'none'"):
        header_of(llama, str(path))


def test_the_largest_gemma_is_read_with_its_scale_and_rotation(tmp_path):
    linear = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    ropes = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    model = tiny("gemma3_text", tmp_path / "model", num_hidden_layers=62, head_dim=32, rope_parameters=ropes)
    again = read_gguf(qcompress.export(model, tmp_path / "x.gguf", target=ENGINE).path)
    assert again.config.query_pre_attn_scalar == model.config.query_pre_attn_scalar == 16
    assert again.config.rope_parameters["full_attention"] == linear


@pytest.mark.parametrize("share", [0.002, 0.01, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_said_to_be(llama, share, tmp_path):
    whole = written(llama, tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(EngineError, match="cut.gguf is cut off or damaged"):
        read_gguf(tmp_path / "cut.gguf")


def test_a_sample_without_tokens_is_refused(llama, tmp_path):
    path = written(llama, tmp_path / "whole.gguf")
    batch = {"input_ids": torch.tensor([[5, 6], [5, 6]]), "attention_mask": torch.tensor([[1, 1], [0, 0]])}
    with pytest.raises(DataError, match="sample 1 of a batch has no tokens: its attention_mask is all zero"):
        qcompress.verify(path, llama, [batch], target=ENGINE)


def test_llama_cpp_says_why_it_does_not_load_a_file(llama, tmp_path):
    header = header_of(llama, "")
    plans = [entry.plan for entry in entries(llama, header)]
    write(tmp_path / "more.gguf", header.values, [*plans, replace(plans[0], name="blk.0.surprise.weight")])
    with pytest.raises(EngineError, match=r"does not load .*more.gguf: .*wrong number of tensors; expected 21, got 20"):
        running.run(tmp_path / "more.gguf", [words(0)], 1)
