"""CIFAR-10: the residual networks of arXiv 1512.03385 (section 4.2) with shortcuts of type A, and the images.

The folder with weights and images is given by ``--data`` or the environment variable ``QCOMPRESS_DATA``; it holds
``cifar10_resnet20.safetensors``, ``cifar10_test_jpegsource.npz`` and ``cifar10_train4k_jpegsource.npz``.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm around a shortcut that pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class ResNet(nn.Module):
    """The CIFAR-10 residual network with ``6·n + 2`` layers."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        stages = []
        for stage in (1, 2, 3):
            blocks = [
                Block(widths[stage - 1] if i == 0 else widths[stage], widths[stage], 2 if i == 0 and stage > 1 else 1)
                for i in range(n)
            ]
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet(depth: int, folder: Path) -> ResNet:
    """The trained network of that depth (20 or 56)."""
    model = ResNet((depth - 2) // 6)
    model.load_state_dict(load_file(folder / f"cifar10_resnet{depth}.safetensors"))
    return model.eval()


def images(folder: Path, name: str, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
    """Normalised images ``(N, 3, 32, 32)`` and labels ``(N,)`` of one file."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        pixels, labels = file["images"][start:stop], file["labels"][start:stop]
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return ((scaled - MEAN) / DEVIATION).contiguous(), torch.from_numpy(labels)


def batched(inputs: Tensor, size: int = 128) -> list[Tensor]:
    """The images in batches."""
    return list(inputs.split(size))


@torch.no_grad()
def logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs for all images, in batches of 512 or of as many values."""
    return torch.cat([model(batch) for batch in inputs.split(max(1, 512 * 3072 // inputs[0].numel()))])


def accuracy(output: Tensor, labels: Tensor) -> float:
    """Percent right."""
    return 100 * float((output.argmax(1) == labels).float().mean())


def kl(reference: Tensor, output: Tensor) -> float:
    """Mean KL divergence in nats."""
    log_p, log_q = reference.double().log_softmax(1), output.double().log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def data_folder(arguments: argparse.Namespace) -> Path:
    """The folder named on the command line or in the environment; ends the program with one line when absent."""
    named = arguments.data or os.environ.get("QCOMPRESS_DATA")
    if not named:
        raise SystemExit(
            "this benchmark needs its data: give --data FOLDER or set QCOMPRESS_DATA (see benchmarks/README.md)"
        )
    folder = Path(named)
    if not folder.is_dir():
        raise SystemExit(f"no folder {folder}: give --data FOLDER or set QCOMPRESS_DATA (see benchmarks/README.md)")
    return folder
