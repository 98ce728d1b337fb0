"""Small models of the shapes that are in use, at random weights: what the parts of a model have to cover."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WORDS, WIDTH, LENGTH = 61, 128, 8


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model and batches for it.

    Attributes:
        make: the model in evaluation mode, the same at every call.
        data: batches.
    """

    make: Callable[[], nn.Module]
    data: list[Any]


class Tagger(nn.Module):
    """Words → two-layer LSTM in both directions → tags."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 64)
        self.rnn = nn.LSTM(64, 96, num_layers=2, bidirectional=True, batch_first=True, proj_size=48)
        self.head = nn.Linear(96, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


class Mobile(nn.Module):
    """Inverted residuals with depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.blocks = nn.Sequential(self.block(16, 24), self.block(24, 64))
        self.head = nn.Sequential(nn.Linear(64, 384), nn.Hardswish(), nn.Linear(384, 100))

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        wide = 6 * inputs
        return nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class Attending(nn.Module):
    """PyTorch's own attention, with keys of another width in one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 4, kdim=48, vdim=48, batch_first=True)
        self.narrow, self.head = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        other = self.narrow(x)
        return self.head(x + self.cross(x, other, other)[0])


def architecture(name: str) -> Architecture:
    """The architecture of a name in `NAMES`."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        ids = [torch.randint(3, WORDS, (size, LENGTH)) for size in (3, 2)]
        images = [torch.randn(size, 3, 16, 16) for size in (3, 2)]
        features = [torch.randn(size, 16, 2 * LENGTH) for size in (3, 2)]
        vectors = [torch.randn(size, LENGTH, WIDTH) for size in (3, 2)]
    words = [{"input_ids": own} for own in ids]
    data: dict[str, list[Any]] = {
        "gpt2": words, "llama": words, "mixtral": words, "bert": words, "tagger": ids, "mobile": images,
        "vit": [{"pixel_values": own} for own in images], "attention": vectors,
        "whisper": [{"input_features": features[i], "decoder_input_ids": ids[i]} for i in range(2)],
    }  # fmt: skip

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            own = {"tagger": Tagger, "mobile": Mobile, "attention": Attending}.get(name)
            return louder(own() if own else of_transformers(name)).eval()

    return Architecture(make, data[name])


NAMES = ("gpt2", "llama", "mixtral", "bert", "vit", "whisper", "tagger", "mobile", "attention")


def louder(model: nn.Module) -> nn.Module:
    """Matrices that transformers draws small, so that outputs are not next to constant."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(max(1.0, float(parameter.shape[-1] ** -0.5 / parameter.std())))
    return model


def of_transformers(name: str) -> nn.Module:
    """A model from a small configuration."""
    import transformers as hub

    depth: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4}
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, **depth}
    ids: dict[str, Any] = {"vocab_size": WORDS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "gpt2":
        config = hub.GPT2Config(**ids, n_embd=WIDTH, n_layer=1, n_head=4, n_positions=LENGTH)
        return hub.GPT2LMHeadModel(config)
    if name == "llama":
        return hub.LlamaForCausalLM(hub.LlamaConfig(**ids, **sizes, num_key_value_heads=2))
    if name == "mixtral":
        config = hub.MixtralConfig(**ids, **sizes, num_key_value_heads=2, num_local_experts=4)
        return hub.MixtralForCausalLM(config)
    if name == "bert":
        return hub.BertForMaskedLM(hub.BertConfig(vocab_size=WORDS, **sizes, max_position_embeddings=LENGTH))
    if name == "vit":
        return hub.ViTForImageClassification(hub.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=11))
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 2 * WIDTH))
    }
    positions = {"max_source_positions": LENGTH, "max_target_positions": LENGTH}
    config = hub.WhisperConfig(**ids, **sides, **positions, d_model=WIDTH, num_mel_bins=16, decoder_start_token_id=1)
    return hub.WhisperForConditionalGeneration(config)
