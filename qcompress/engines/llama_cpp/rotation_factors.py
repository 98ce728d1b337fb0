"""Llama 3's rotary positions in a GGUF file, which has factors of its frequencies instead of their parameters.

Llama 3.1 and later slow down the low frequencies by a factor, keep the high ones, and interpolate between the two
(arXiv:2407.21783). llama.cpp divides every frequency by its number in the tensor `FACTORS`.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qcompress.engines.llama_cpp.container import TensorPlan

FACTORS: Final = "rope_freqs.weight"
KIND: Final = "llama3"

USUAL: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The parameters that all models of Llama 3.1 to 3.3 have; only the factor differs."""


def factors_of(config: Any) -> NDArray[np.float32]:
    """Return what every frequency of a transformers configuration of this type is divided by, ``(dimensions / 2,)``."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies = ROPE_INIT_FUNCTIONS[KIND](config, None)[0].double().numpy()
    halves = np.arange(len(frequencies)) / len(frequencies)
    factors: NDArray[np.float32] = (config.rope_parameters["rope_theta"] ** -halves / frequencies).astype(np.float32)
    return factors


def plan_of(config: Any) -> TensorPlan:
    """Return the tensor of a configuration of this type."""
    factors = factors_of(config)
    return TensorPlan(name=FACTORS, shape=factors.shape, number=0, size_bytes=factors.nbytes, content=lambda: factors)


def are_those_of(config: Any, plan: TensorPlan) -> bool:
    """Whether the tensor has the factors of a configuration of this type."""
    if plan.name != FACTORS:
        return False
    factors = factors_of(config)
    return plan.shape == factors.shape and np.allclose(plan.content(), factors, rtol=1e-4)


def usual_parameters(plan: TensorPlan, base: float) -> dict[str, Any]:
    """Return the parameters that a tensor of this type most likely comes from; `are_those_of` says whether it does."""
    factor = float(f"{plan.content().max():.5g}")  # without float32's rounding
    return {"rope_type": KIND, "rope_theta": base, "factor": factor, **USUAL}
