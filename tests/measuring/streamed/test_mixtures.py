"""Mixtures of experts with many tokens: a token that changes its experts at a small move is no wrong gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qcompress
from tests.models import seeded

OPTIONS = qcompress.prune_quantize(bits=(4,), sparsity=(0,), group_size=32)
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "Mixtral": {"num_local_experts": 8},
    "GptOss": {"num_local_experts": 8, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("Qwen3Moe", 64), ("GptOss", 64),
     *(pytest.param(*case, marks=pytest.mark.slow)
       for case in [("Qwen3Moe", 512), ("Mixtral", 64), ("Mixtral", 512), ("GptOss", 512)])],
)  # fmt: skip
def test_all_parts_of_a_mixture_of_experts_are_measured(kind: str, tokens: int, tmp_path: Path) -> None:
    import transformers

    for seed in (1, 2):
        config = getattr(transformers, f"{kind}Config")(**SIZES, **KINDS[kind])
        model = seeded(lambda config=config: getattr(transformers, f"{kind}ForCausalLM")(config), seed)
        model.save_pretrained(tmp_path / str(seed))
        data = [torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(seed))]
        opened = qcompress.open_model(tmp_path / str(seed))
        for network in (opened, model):
            found = qcompress.measure(network, data, OPTIONS, method="sampled")
            assert not found.no_choice
            assert not found.tried
