"""Tokenizers in the header of a GGUF file: llama.cpp splits and frames text as the folder's tokenizer does."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import BertProcessing, RobertaProcessing, TemplateProcessing
from torch import nn

import qcompress
from qcompress.engines.llama_cpp import running
from qcompress.engines.llama_cpp.engine import LlamaCpp
from qcompress.errors import EngineError
from tests.engines.tiny import WORDS, tiny, words, write_tokenizer

ENGINE = LlamaCpp(threads=1)
FRAMES = {
    "none": None,
    "template": TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]),
    "before": TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
    "roberta": RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=False, add_prefix_space=False),
    "bert": BertProcessing(("</s>", 2), ("<s>", 1)),
}


def with_tokenizer(folder: Path, change: Any) -> Tokenizer:
    """Write a tokenizer of byte pairs to the folder, changed by a function."""
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def framed(frame: Any) -> Any:
    return lambda tokenizer: setattr(tokenizer, "post_processor", frame) if frame is not None else None


@pytest.mark.parametrize("frame", FRAMES)
def test_an_encoder_with_byte_pairs_runs_and_frames_texts_as_its_tokenizer(frame: str, tmp_path: Path) -> None:
    encoder = tiny("bert", tmp_path, type_vocab_size=3)
    tokenizer = with_tokenizer(tmp_path, framed(FRAMES[frame]))
    path = qcompress.export(encoder, tmp_path / "whole.gguf", target=ENGINE).path
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.token_type_count"].contents() == 3
    found = qcompress.verify(path, encoder, [words(0), words(1)], target=ENGINE)
    assert found.ok, found.why_not

    server = running._server(path, [[[0] * 20]], 1, embedding=True)
    answer = server.handle_embeddings({"input": ["the man and the hat"]})
    (expected,) = ENGINE.emulate(encoder, [torch.tensor([tokenizer.encode("the man and the hat").ids])]).outputs
    torch.testing.assert_close(torch.tensor(answer["data"][0]["embedding"]), expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frame", FRAMES)
def test_a_language_model_frames_texts_as_its_tokenizer(frame: str, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path)
    tokenizer = with_tokenizer(tmp_path, framed(FRAMES[frame]))
    path = qcompress.export(model, tmp_path / "whole.gguf", target=ENGINE).path
    assert prompt_length(path, "the man") == len(tokenizer.encode("the man").ids)


def test_frames_of_several_tokens_are_refused(tmp_path: Path) -> None:
    frame = TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 1)])
    encoder = tiny("bert", tmp_path)
    with_tokenizer(tmp_path, framed(frame))
    with pytest.raises(EngineError, match="adds 2 tokens before a text and 0 after it; give a GGUF file"):
        qcompress.export(encoder, tmp_path / "x", target=ENGINE)


def name_of(path: Path) -> str:
    return str(gguf.GGUFReader(path).fields["general.name"].contents())


def prompt_length(path: Path, text: str) -> int:
    """Number of tokens that llama.cpp makes of a text."""
    server = running._server(path, [[[0] * 40]], 1, embedding=False)
    answer = server.handle_completions({"prompt": text, "max_tokens": 1, "temperature": 0})
    return int(answer["usage"]["prompt_tokens"])


@pytest.mark.parametrize(("folder", "name"), [("my-phi3-like", "my-phi-like"), ("Phi-3-mini", "phi-mini")])
def test_a_name_that_llama_cpp_has_rules_for_is_left_out_where_they_do_not_hold(
    folder: str, name: str, tmp_path: Path
) -> None:
    model = tiny("phi3", tmp_path / folder)
    path = qcompress.export(model, tmp_path / "whole.gguf", target=ENGINE).path
    assert name_of(path) == name
    assert qcompress.verify(path, model, [words(0)], target=ENGINE).ok


@pytest.mark.parametrize("strips", [True, False])
@pytest.mark.parametrize("folder", ["phi3", "another"])
def test_white_space_after_special_tokens_is_read_as_by_the_tokenizer(
    strips: bool, folder: str, tmp_path: Path
) -> None:
    def change(tokenizer: Tokenizer) -> None:
        kept = [AddedToken(word, special=True) for word in ("<unk>", "<s>", "<|endoftext|>")]
        more = [AddedToken(word, special=True, rstrip=strips) for word in ("<pad>", "</s>", "<|user|>")]
        tokenizer.add_special_tokens([*kept, *more])

    model: nn.Module = tiny("phi3", tmp_path / folder, vocab_size=WORDS)
    tokenizer = with_tokenizer(tmp_path / folder, change)
    path = qcompress.export(model, tmp_path / "whole.gguf", target=ENGINE).path
    assert ("phi3" in name_of(path) or "phi-3" in name_of(path)) is strips
    text = "<|user|>\n\nthe man<s>\nthe hat"
    assert prompt_length(path, text) == len(tokenizer.encode(text).ids)
