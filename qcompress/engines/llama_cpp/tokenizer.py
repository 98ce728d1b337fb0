"""Convert the tokenizer files of a Hugging Face folder to the values of a GGUF header."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompress.engines.llama_cpp.container import INT32, Value
from qcompress.errors import EngineError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "cls": "cls",
           "mask": "mask"}  # GGUF's words, with the one it spells so  # fmt: skip
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


def tokenizer_values(folder: Path, config: Any, *, encoder: bool = False) -> dict[str, Value]:
    """Return the header's values from ``tokenizer.json``, with the model's name, which llama.cpp reads with the tokens.

    Args:
        folder: folder of Hugging Face files.
        config: configuration of the model, whose vocabulary may be larger than the tokenizer's.
        encoder: whether the model is an encoder, for which llama.cpp needs more values.

    Raises:
        EngineError: there is no tokenizer, or llama.cpp may split text differently; the message suggests a remedy.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        raise EngineError(f"{folder} has no tokenizer.json, which a GGUF file needs")
    tokenizer = json.loads(file.read_bytes())
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_bytes()) if settings_file.exists() else {}
    kind = tokenizer["model"]["type"]
    if kind == "BPE" and tokenizer["model"].get("byte_fallback"):
        values = _sentencepiece(folder, tokenizer, config.vocab_size)
    elif kind == "BPE":
        values = _byte_pairs(tokenizer, config.vocab_size)
    elif kind == "WordPiece":
        values = _word_pieces(tokenizer, config.vocab_size)
    else:
        raise EngineError(f"a tokenizer of type {kind!r} cannot be written to GGUF; {_INSTEAD}")
    template = folder / "chat_template.jinja"
    if "chat_template" not in settings and template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    values |= _special(settings, tokenizer, config)
    if kind != "WordPiece":  # llama.cpp frames word pieces itself
        values |= _framing(settings, tokenizer)
    if encoder:
        values["tokenizer.ggml.token_type_count"] = Value.of(getattr(config, "type_vocab_size", 2))
    return values | {"general.name": Value.of(_named(folder.resolve().name, tokenizer))}


_INSTEAD = "give a GGUF file of the model as source, such as LlamaCpp(source='model-f16.gguf')"


def _words(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every token id; ids without a token get one that is never used.

    Raises:
        EngineError: there are more tokens than the model has.
    """
    words = {number: word for word, number in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(words, NORMAL)
    for added in tokenizer.get("added_tokens") or ():
        words[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER
    if max(words, default=-1) >= size:
        raise EngineError(f"the tokenizer has {max(words) + 1} tokens, the model {size}")
    return [words.get(n, f"[PAD{n}]") for n in range(size)], [kinds.get(n, UNUSED) for n in range(size)]


def _table(model: str, words: list[str], kinds: list[int]) -> dict[str, Value]:
    return {
        "tokenizer.ggml.model": Value.of(model),
        "tokenizer.ggml.tokens": Value.of(words),
        "tokenizer.ggml.token_type": Value(content=kinds, kind=9, item_kind=INT32),
    }


def _byte_pairs(tokenizer: dict[str, Any], size: int) -> dict[str, Value]:
    words, kinds = _words(tokenizer, size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    return _table("gpt2", words, kinds) | {
        "tokenizer.ggml.pre": Value.of(_splitting(tokenizer.get("pre_tokenizer"))),
        "tokenizer.ggml.merges": Value(content=merges, kind=9, item_kind=8),
    }


def _splitting(pre: dict[str, Any] | None) -> str:
    """llama.cpp's name of the rules by which text is split before pairs are merged.

    Raises:
        EngineError: the rules have no name here.
    """
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex", "")
        if pattern in _SPLITS:
            return _SPLITS[pattern]
    raise EngineError(f"the rules by which the tokenizer splits text are not supported ({pre}); {_INSTEAD}")


def _word_pieces(tokenizer: dict[str, Any], size: int) -> dict[str, Value]:
    words, kinds = _words(tokenizer, size)
    prefix = tokenizer["model"].get("continuing_subword_prefix", "##")
    shown = [
        word if kind != NORMAL else word.removeprefix(prefix) if word.startswith(prefix) else f"\u2581{word}"
        for word, kind in zip(words, kinds, strict=True)
    ]
    return _table("bert", shown, kinds) | {"tokenizer.ggml.pre": Value.of("default")}


def _sentencepiece(folder: Path, tokenizer: dict[str, Any], size: int) -> dict[str, Value]:
    """Take the scores from ``tokenizer.model``; without that file, the score of a token is minus its id."""
    words, kinds = _words(tokenizer, size)
    kinds = [BYTE if kind == NORMAL and _is_byte(word) else kind for word, kind in zip(words, kinds, strict=True)]
    scores = [float(-number) for number in range(size)]
    file = folder / "tokenizer.model"
    if file.exists():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(file))
        for number in range(min(pieces.vocab_size(), size)):
            scores[number] = float(pieces.GetScore(number))
    unknown = tokenizer["model"].get("unk_token")
    kinds = [UNKNOWN if word == unknown else kind for word, kind in zip(words, kinds, strict=True)]
    return _table("llama", words, kinds) | {
        "tokenizer.ggml.scores": Value.of(scores),
        "tokenizer.ggml.pre": Value.of("default"),
    }


def _is_byte(word: str) -> bool:
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")


def _framing(settings: Mapping[str, Any], tokenizer: dict[str, Any]) -> dict[str, Value]:
    """Return the tokens before and after a text (its beginning and end in llama.cpp); the settings may omit them.

    Raises:
        EngineError: the tokenizer adds other tokens than one before and one after.
    """
    steps = tokenizer.get("post_processor") or {"type": "ByteLevel"}
    steps = steps["processors"] if steps["type"] == "Sequence" else [steps]
    before: list[int] = []
    after: list[int] = []
    for step in steps:
        if step["type"] in ("RobertaProcessing", "BertProcessing"):
            before, after = [step["cls"][1]], [step["sep"][1]]
        elif step["type"] == "TemplateProcessing":
            pieces = [step["special_tokens"].get(piece.get("SpecialToken", {}).get("id")) for piece in step["single"]]
            text = pieces.index(None)
            before, after = ([number for piece in side for number in piece["ids"]]
                             for side in (pieces[:text], pieces[text + 1 :]))  # fmt: skip
        elif step["type"] != "ByteLevel":
            raise EngineError(f"a tokenizer with {step['type']} cannot be written to GGUF; {_INSTEAD}")
    if max(len(before), len(after)) > 1:
        raise EngineError(
            f"the tokenizer adds {len(before)} tokens before a text and {len(after)} after it; {_INSTEAD}"
        )
    values = {}
    for name, numbers in (("bos", before), ("eos", after)):
        wish = settings.get(f"add_{name}_token")
        values[f"tokenizer.ggml.add_{name}_token"] = Value.of(wish if isinstance(wish, bool) else bool(numbers))
        values |= {f"tokenizer.ggml.{name}_token_id": Value.of(number) for number in numbers}
    return values


PHI_3 = re.compile("phi-?3", re.IGNORECASE)
STRIPPED, NOT_STRIPPED = "</s>", ("<unk>", "<s>", "<|endoftext|>")


def _named(name: str, tokenizer: dict[str, Any]) -> str:
    """Return the model's name, with Phi 3's in it if and only if the tokenizer treats white space as Phi 3's.

    By a name with "phi-3" or "phi3" llama.cpp decides that white space after special tokens is dropped, except after
    three of them, and does not load files whose vocabulary lacks those.
    """
    added = {token["content"]: bool(token.get("rstrip")) for token in tokenizer.get("added_tokens") or ()}
    known = {**tokenizer["model"]["vocab"], **added}
    as_phi = all(word in known for word in (STRIPPED, *NOT_STRIPPED)) and all(
        strips is (word not in NOT_STRIPPED) for word, strips in added.items()
    )
    if as_phi:
        return name if PHI_3.search(name) else f"{name} (phi-3)"
    return PHI_3.sub("phi", name)


def _special(settings: Mapping[str, Any], tokenizer: dict[str, Any], config: Any) -> dict[str, Value]:
    """Ids of the special tokens, and the chat template."""
    numbers = dict(tokenizer["model"]["vocab"]) | {
        added["content"]: added["id"] for added in tokenizer.get("added_tokens") or ()
    }
    values = {}
    for short, long in SPECIAL.items():
        word = settings.get(f"{short}_token")
        word = word.get("content") if isinstance(word, dict) else word
        number = numbers.get(word) if word is not None else getattr(config, f"{short}_token_id", None)
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            values[f"tokenizer.ggml.{long}_token_id"] = Value.of(number)
    if isinstance(template := settings.get("chat_template"), str):
        values["tokenizer.chat_template"] = Value.of(template)
    return values
