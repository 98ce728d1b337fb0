"""Tiny language models saved as Hugging Face folders, to be opened."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


def saved(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, shards: bool = False, **more: Any) -> Path:
    """A random model of transformers with three blocks, in ``folder``; the same in every run."""
    import transformers

    words = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, **more,
    }  # fmt: skip
    if kind == "GPT2":
        words = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, **more}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = getattr(transformers, f"{kind}Config")(**words)
        model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(config)
        for own in model.parameters():  # norms of ones and biases of zeros would hide what is read from where
            own.data += 0.05 * torch.randn(own.shape)
    model.to(dtype).save_pretrained(folder, max_shard_size="12KB" if shards else "5GB")
    return folder


def reconfigured(folder: Path, **values: Any) -> None:
    """Change values in a folder's ``config.json``."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def in_memory(folder: Path) -> nn.Module:
    """The model of a folder as transformers loads it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model: nn.Module = getattr(transformers, config.architectures[0]).from_pretrained(folder)
    return model.eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random words."""
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))
