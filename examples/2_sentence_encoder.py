"""
A sentence encoder: compress embeddings, judge by similarity
=============================================================

An encoder is used through its embeddings, not through class probabilities. Take the squared error of the embeddings
as the loss, and tell qcompress with ``forward`` how a batch becomes one output tensor. The encoder here is a small
transformer with random weights, so that this page runs anywhere; a pretrained one is handled the same way.
"""

# %%
# An encoder with masks
# ---------------------
# Batches are dicts, as tokenizers make them. The output is the mean over the words that are there.

import torch
from torch import Tensor, nn

import qcompress


class Encoder(nn.Module):
    """Token embeddings, two transformer layers, mean pooling over the words that are not padding."""

    def __init__(self, words: int = 6000, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=128, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``(N, words)`` ids and mask → ``(N, width)`` embeddings."""
        hidden = self.layers(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        weight = attention_mask.unsqueeze(-1).to(hidden)
        return (hidden * weight).sum(1) / weight.sum(1)


torch.manual_seed(0)
encoder = Encoder().eval()


def sentences(count: int) -> dict[str, Tensor]:
    """A batch of random sentences of 6 to 16 words, padded with zeros."""
    lengths = torch.randint(6, 17, (count, 1))
    mask = (torch.arange(16) < lengths).long()
    return {"input_ids": torch.randint(1, 6000, (count, 16)) * mask, "attention_mask": mask}


calibration = [sentences(32) for _ in range(8)]

# %%
# Compress to a fifth of the bytes
# --------------------------------
# ``loss="mse"`` is the mean squared difference of the embeddings.

result = qcompress.compress(
    encoder,
    calibration,
    budget={"bytes": 0.2},
    loss="mse",
    forward=lambda model, batch: model(**batch),
    time_limit=10,
)
print(result.report.to_markdown())

# %%
# What stays the same
# -------------------
# The cosine similarities between unseen sentences before and after.

unseen = sentences(64)
with torch.no_grad():
    before, after = (nn.functional.normalize(model(**unseen), dim=-1) for model in (encoder, result.model))
difference = (before @ before.T - after @ after.T).abs().max().item()
print(f"largest change of a similarity: {difference:.4f}")
