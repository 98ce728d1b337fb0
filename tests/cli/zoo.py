"""A model, data and command lines that the tests of the commands share."""

import safetensors.numpy
import torch

from qcompress import load_compressed
from qcompress.cli import main

ZOO = """
import torch
from torch import nn

NUMBER = 3
calls = []


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def batches():
    torch.manual_seed(1)
    return [torch.randn(16, 8) for _ in range(3)]


def once():
    return (batch for batch in batches())


def breaks():
    raise RuntimeError("the model's own error,\\nin two lines")


def score(model):
    return float(model(batches()[0]).argmax(1).float().mean())


def squared(output, batch):
    return output.square().sum(1)


def first(model, batch):
    return model(batch)
"""


MEASURE = ["measure", "zoo_for_cli:network", "zoo_for_cli:batches", "--bits", "2,4,8", "--sparsity", "0"]
COMPRESS = ["compress", *MEASURE[1:], "--budget", "bytes=0.3", "--solver", "brute-force"]
TUNED = ["compress", *MEASURE[1:3], "--no-guard", "--no-prune-quantize", "--ranks", "2,4", "--factor-bits", "3,4"]
TUNED += ["--budget", "bytes=0.5", "--solver", "brute-force", "--finetune-steps", "20", "--learning-rate", "3e-3"]


def ran(arguments):
    """The command ends well."""
    assert main(arguments) == 0


def nats(file):
    """The mean KL divergence of the original's softmax to a file's model over the batches, by the book."""
    import zoo_for_cli

    inputs = torch.cat(zoo_for_cli.batches())
    with torch.no_grad():
        p, q = (model(inputs).double().softmax(1) for model in (zoo_for_cli.network(), loaded(file)))
    return float((p * (p / q).log()).sum(1).mean())


def loaded(file):
    import zoo_for_cli

    return load_compressed(file, zoo_for_cli.network)


def payload(file):
    return sum(array.nbytes for array in safetensors.numpy.load_file(file).values())
