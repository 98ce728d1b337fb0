"""Effects of options for stacked matrices, such as all experts in one parameter, in one pass per sample.

The output of the module is not linear in such a parameter, and no call shows the input of a single matrix. The gradient
of the whole parameter gives the effects to first order. A gradient is summed over the samples of a batch, so each
sample is run alone, with its slice of the batch's probes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.measuring.methods.direct import Direct
from qcompress.measuring.methods.gradient_check import misleading
from qcompress.measuring.methods.gradients import Gradients
from qcompress.model import forward as forwards
from qcompress.model.alone import same_outputs
from qcompress.model.batches import samples
from qcompress.model.padding import at_real_positions


def effects_of_stacks(
    direct: Direct, parts: Sequence[int], batch: Any, point: Tensor, probes: Sequence[Tensor], *, check: bool
) -> tuple[NDArray[np.float32] | None, str]:
    """Return the effects ``(options, samples, probes)`` of parts, or None and why gradients do not give them.

    Args:
        direct: the model, its options and how to run a batch.
        parts: indices of the parts.
        batch: a batch of the data.
        point: its outputs ``(samples, …)``.
        probes: probes of the outputs, of the same shape.
        check: whether to check on the first sample that outputs follow the gradients.
    """
    model, alone = direct.model, list(samples(batch))
    if len(alone) != len(point):
        return None, "its effects on different samples cannot be separated"
    candidates = direct.candidates.some(parts)
    if check:
        weights = [layer.site(model).weight for layer in candidates.layers]
        wrong = misleading(
            lambda: at_real_positions(alone[0], forwards.run(model, alone[0], direct.forward)),
            weights,
            torch.Generator(),
        )
        if wrong:
            return None, "the outputs do not follow its gradient"
    with Gradients(model, candidates) as gradients:
        for index, sample in enumerate(alone):
            with torch.enable_grad():
                output = forwards.run(model, sample, direct.forward)
            if not same_outputs(model, output.detach(), point[index : index + 1]):
                return None, "samples give other outputs alone than within a batch"
            for number, probe in enumerate(probes):
                gradients.add(output, probe[index : index + 1].to(output), keep=number + 1 < len(probes))
        effects = gradients.effects().astype(np.float32)
    return effects.reshape(candidates.num_options, len(alone), len(probes)), ""
