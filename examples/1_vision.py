"""
A vision model, from measuring to a smaller file
================================================

Train a small residual network on handwritten digits, let qcompress decide how many bits and how much sparsity every
layer gets within a tenth of the bytes, and look at what was predicted, what was measured and what was written.
"""

# %%
# A network and its data
# ----------------------
# Any ``torch.nn.Module`` and any re-iterable of batches will do. Labels are not needed: the loss is the KL divergence
# to the original's own predictions.

import tempfile
from pathlib import Path

import torch

import qcompress
from qcompress.demo import accuracy, digits, digits_network, train

images, labels, test_images, test_labels = digits()
torch.manual_seed(0)
network = digits_network()
train(network, images, labels)
calibration = list(images[:512].split(128))
print(f"the original: {accuracy(network, test_images, test_labels):.2%} of the test images right")

# %%
# One call
# --------
# ``compress`` measures what every option of every layer does to the loss, states the choice as an optimisation
# problem, solves it, and applies the solution. The report says how far from optimal the choice can be at most.

result = qcompress.compress(network, calibration, budget={"bytes": 0.1}, time_limit=10)
print(result.report.to_markdown())

# %%
# The smaller file
# ----------------
# The file holds the codes as they were chosen, packed. Loading gives the same model to the last bit.

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "small.safetensors"
    qcompress.save_compressed(result.model, path)
    print(f"{path.stat().st_size:,} bytes on disk")
    loaded = qcompress.load_compressed(path, digits_network)

with torch.no_grad():
    assert torch.equal(loaded(test_images), result.model(test_images))
print(f"the smaller model: {accuracy(loaded, test_images, test_labels):.2%} of the test images right")
