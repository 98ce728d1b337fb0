"""The tokenizer in a GGUF file is the folder's, also of architectures whose files transformers does not read."""

from pathlib import Path

import pytest

import qcompress
from qcompress.cli.language_model import text_windows
from qcompress.engines.llama_cpp.tokenizer_file import readable
from qcompress.errors import EngineError
from tests.engines.tiny import DECODER, KINDS, tiny

TEXTS = (
    "the cat and the man",
    " the  cat",
    "the\n\ncat   \t x  ",
    "\U0001f600 \u00e9 \u00df \u2581the \u4e2d",
    "a\x00b",
    "",
    "<bos>the<eos> <pad>cat",
    "\u2581\u2581\u2581 \u2581",
    "123 don't!",
)


def write_sentence_pieces(folder: Path) -> int:
    """A tokenizer with Gemma's rules, and the number of its tokens."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {f"<0x{byte:02X}>": byte + 4 for byte in range(256)}
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("a", "n"), ("an", "d"), ("\u2581", "\u2581"), ("c", "a"),
              ("ca", "t"), ("\u2581\u2581", "\u2581\u2581")]  # fmt: skip
    for word in [*("".join(pair) for pair in merges), *"\u2581abcdefghijklmnopqrstuvwxyz\u00e9\n"]:
        words.setdefault(word, len(words))
    tokenizer = GemmaTokenizer(vocab=words, merges=merges)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save_pretrained(folder)
    return len(words)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bert"])
def test_the_tokenizer_in_a_file_is_the_folders(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    model = tiny(kind, tmp_path / "model")
    if kind.startswith("gemma"):
        for file in (tmp_path / "model").glob("*token*"):
            file.unlink()
        assert write_sentence_pieces(tmp_path / "model") <= DECODER["vocab_size"]
    file = qcompress.export(model, tmp_path / "whole.gguf", target="llama.cpp").path
    expected = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    with readable(file) as source:
        found = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    for text in TEXTS:
        assert found(text)["input_ids"] == expected(text)["input_ids"], text


def test_the_file_of_an_encoder_is_refused_for_plain_text_with_the_way_that_works(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = qcompress.export(tiny("bert", tmp_path / "model"), tmp_path / "whole.gguf", target="llama.cpp").path
    with pytest.raises(EngineError, match=r"is an encoder \(bert\), .* load it with read_gguf"):
        text_windows(file, tmp_path / "text.txt", length=12)
