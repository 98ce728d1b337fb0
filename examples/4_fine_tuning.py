"""
Fine-tune what is stored
========================

A compressed model can be trained without growing: what is trained is what will be stored, and the original's outputs
are the target, so no labels are needed.
"""

# %%
# A choice that costs accuracy
# ----------------------------

import torch

import qcompress
from qcompress.demo import accuracy, digits, digits_network, train

images, labels, test_images, test_labels = digits()
torch.manual_seed(0)
network = digits_network()
train(network, images, labels)
data = list(images.split(128))
result = qcompress.compress(network, data, budget={"bytes": 0.063}, time_limit=10)
print(f"original {accuracy(network, test_images, test_labels):.2%}")
print(f"chosen   {accuracy(result.model, test_images, test_labels):.2%}, loss {result.report.loss_measured:.4f} nats")

# %%
# 100 steps of distillation
# -------------------------
# The best weights on ``validation`` are kept, so the loss there never rises.

tuned = qcompress.finetune(result.model, data, 100, teacher=network, validation=data)
after = qcompress.mean_loss(network, tuned, data)
print(f"tuned    {accuracy(tuned, test_images, test_labels):.2%}, loss {after:.4f} nats")
