"""Tiny language models of random weights with a tokenizer of their own, as folders of Hugging Face files."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = 320
SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": WORDS, "max_position_embeddings": 128}  # fmt: skip
DECODER = {**SHAPE, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {**DECODER, "tie_word_embeddings": True},
    "mistral": {**DECODER, "sliding_window": None},
    "qwen2": {**DECODER, "tie_word_embeddings": False},
    "qwen3": {**DECODER, "head_dim": 32, "tie_word_embeddings": True},
    "gemma": {**DECODER, "head_dim": 16},
    "gemma2": {**DECODER, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {**DECODER, "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": {**DECODER, "tie_word_embeddings": False},
    "bert": SHAPE,
}


TIED = ("gemma", "gemma2")  # llama.cpp has no output layer of their own for these


def write_tokenizer(folder: Path) -> None:
    """All bytes as words and a few pairs, with three words of a meaning of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number + 3 for number, word in enumerate(alphabet)}
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "the")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary) + 3
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<pad>": 0, "<s>": 1, "</s>": 2}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    whole.save_pretrained(folder)


def write_word_pieces(folder: Path) -> None:
    """A tokenizer of an encoder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    letters = [chr(ord("a") + n) for n in range(26)]
    words = special | {word: 5 + n for n, word in enumerate(letters + [f"##{letter}" for letter in letters])}
    tokenizer = Tokenizer(models.WordPiece(vocab=words, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    named = {f"{word.strip('[]').lower()}_token": word for word in special}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    whole.save_pretrained(folder)


def tiny(kind: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A model of random weights, loaded from ``folder``, where it is written to first."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **(KINDS[kind] | changes))
    factory = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = factory.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases that all differ
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4.0)  # from outputs that are all alike to ones that tell words apart
    model.save_pretrained(folder)
    (write_word_pieces if kind == "bert" else write_tokenizer)(folder)
    return factory.from_pretrained(folder, dtype=dtype).eval()


def any_tiny(rng: random.Random, folder: Path) -> nn.Module:
    """One of any architecture and shape that llama.cpp runs, in any precision; widths fit few types or all."""
    kind = rng.choice(list(KINDS))
    heads, head_dim = rng.choice([(2, 16), (4, 16), (2, 32), (3, 32), (5, 8), (4, 64)])
    changes: dict[str, Any] = {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "intermediate_size": rng.choice([32, 50, 96, 160, 256]),
        "num_hidden_layers": rng.choice([1, 1, 2]),
        "vocab_size": WORDS + rng.choice([0, 0, 1, 13]),
    }
    if kind != "bert":
        changes |= {
            "num_key_value_heads": rng.choice([own for own in (1, 2, 4, heads) if heads % own == 0]),
            "tie_word_embeddings": kind in TIED or (kind != "phi3" and rng.random() < 0.5),
        }
        changes |= {"head_dim": head_dim} if "head_dim" in KINDS[kind] else {}
        changes |= {"query_pre_attn_scalar": head_dim} if "query_pre_attn_scalar" in KINDS[kind] else {}
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    return tiny(kind, folder, rng.randrange(10**6), dtype=dtype, **changes)


def words(seed: int, samples: int = 2, length: int = 12) -> torch.Tensor:
    """Random word numbers."""
    return torch.randint(5, 60, (samples, length), generator=torch.Generator().manual_seed(seed))
