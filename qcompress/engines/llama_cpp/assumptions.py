"""What llama.cpp's graphs assume: a configuration that differs cannot be written to GGUF.

The header of a file holds sizes, epsilons and rotations. Activation functions, which layers have a window, and the like
are fixed in llama.cpp for every architecture, so a file of a model that computes otherwise would load and give other
outputs. Invariant: every field that a configuration's class declares is written, has no effect on outputs, or is
assumed here; any other field must have its default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from qcompress.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumption:
    """A field of the configuration that llama.cpp does not read in the file.

    Attributes:
        field: name of the field.
        assumed: what llama.cpp computes with, in words.
        holds: function from a configuration to whether it agrees.
    """

    field: str
    assumed: str
    holds: Callable[[Any], bool]


def require_expressible(config: Any) -> None:
    """Raise an error for a configuration of a known ``model_type`` that a GGUF file cannot express.

    Raises:
        EngineError: the message names the field, its value and what llama.cpp computes with.
    """
    assumptions = ASSUMPTIONS.get(config.model_type, ())
    for assumption in assumptions:
        if not assumption.holds(config):
            raise _refused(config, assumption.field, assumption.assumed)
    known = {assumption.field for assumption in assumptions} | WRITTEN | WITHOUT_EFFECT
    usual = type(config)()
    for field in sorted(declared_fields(type(config)) - known):
        if getattr(config, field, None) != (default := getattr(usual, field, None)):
            raise _refused(config, field, f"the default {default!r}")


def declared_fields(kind: type) -> set[str]:
    """Return the fields that a configuration's class declares beyond those of every transformers model."""
    classes = [base for base in kind.__mro__ if base.__module__.startswith("transformers.models.")]
    names = {name for base in classes for name, value in vars(base).get("__annotations__", {}).items()
             if "ClassVar" not in str(value)}  # fmt: skip
    return {name for name in names if not name.startswith(("base_model_", "_")) and name != "model_type"}


def _refused(config: Any, field: str, assumed: str) -> EngineError:
    return EngineError(
        f"the model has {field}={getattr(config, field, None)!r}, but llama.cpp computes models of type "
        f"{config.model_type!r} with {assumed}, and a GGUF file cannot change that; load the model with this setting "
        "if it is acceptable, or export it for another engine, such as 'onnxruntime'"
    )


def _one_of(field: str, *values: Any) -> Assumption:
    return Assumption(
        field=field,
        assumed=" or ".join(f"{field}={value!r}" for value in values),
        holds=lambda config: getattr(config, field, values[0]) in values,
    )


def _above(field: str, least: int) -> Assumption:
    return Assumption(
        field=field, assumed=f"a number above {least}", holds=lambda config: (getattr(config, field) or 0) > least
    )


def _within_window(config: Any) -> bool:
    return config.sliding_window is None or config.sliding_window >= config.max_position_embeddings


def _full_every(period: int) -> Assumption:
    def holds(config: Any) -> bool:
        kinds = ["full_attention" if n % period == 0 else "sliding_attention"
                 for n in range(1, config.num_hidden_layers + 1)]  # fmt: skip
        return list(config.layer_types) == kinds

    return Assumption(field="layer_types", assumed=f"full attention in layers {period}, {2 * period}, ...", holds=holds)


def query_scale(config: Any) -> int:
    """Return the number whose inverse root llama.cpp scales Gemma's attention with.

    It is the width of a head, but in the largest model of each generation, which llama.cpp knows by its layers, the
    width of the model by its heads.
    """
    largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    if config.num_hidden_layers == largest:
        return int(config.hidden_size // config.num_attention_heads)
    return int(config.head_dim)


_GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python")  # equal within 5e-4
_SILU = _one_of("hidden_act", "silu", "swish")
_NO_BIAS = _one_of("attention_bias", False)
_TIED = _one_of("tie_word_embeddings", True)
_CAUSAL = _one_of("use_bidirectional_attention", None, False)
_SCALE = Assumption(
    field="query_pre_attn_scalar",
    assumed="the width of a head (in a model of as many layers as the largest, hidden_size by heads)",
    holds=lambda config: config.query_pre_attn_scalar == query_scale(config),
)
_HEADS = Assumption(
    field="head_dim",
    assumed="hidden_size by heads",
    holds=lambda config: (
        (getattr(config, "head_dim", None) or 0) in (0, config.hidden_size // config.num_attention_heads)
    ),
)
_NO_WINDOW = Assumption(
    field="sliding_window", assumed="sliding_window=None, attention to the whole context", holds=_within_window
)
_NO_LAYER_WINDOW = Assumption(
    field="sliding_window",
    assumed="sliding_window=None, attention to the whole context",
    holds=lambda config: _within_window(config) or "sliding_attention" not in config.layer_types,
)
_GEMMA = (_NO_BIAS, _CAUSAL)

ASSUMPTIONS: Final[dict[str, tuple[Assumption, ...]]] = {
    "llama": (_SILU,),
    "mistral": (_SILU, _NO_WINDOW),
    "qwen2": (_SILU, _NO_LAYER_WINDOW, _HEADS),
    "qwen3": (_SILU, _NO_LAYER_WINDOW, _NO_BIAS),
    "gemma": (_one_of("hidden_act", *_GELU), *_GEMMA, _TIED),
    "gemma2": (_one_of("hidden_activation", *_GELU), *_GEMMA, _TIED, _full_every(2), _above("sliding_window", 1),
               _SCALE, _above("attn_logit_softcapping", 0), _above("final_logit_softcapping", 0)),
    "gemma3_text": (_one_of("hidden_activation", *_GELU), *_GEMMA, _full_every(6), _above("sliding_window", 1), _SCALE,
                    _one_of("attn_logit_softcapping", None), _one_of("final_logit_softcapping", None)),
    "phi3": (_SILU, _NO_WINDOW, _HEADS),
    "bert": (_one_of("hidden_act", *_GELU), _one_of("is_decoder", False), _one_of("add_cross_attention", False),
             _one_of("position_embedding_type", "absolute")),
}  # fmt: skip
"""What llama.cpp assumes, by ``config.model_type``."""

WRITTEN: Final = frozenset((
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "layer_norm_eps", "rope_parameters", "sliding_window",
    "type_vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias",
))  # fmt: skip
"""Fields that are in the header, or seen in which tensors there are."""

WITHOUT_EFFECT: Final = frozenset((
    "attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "classifier_dropout", "initializer_range", "use_cache", "pretraining_tp", "bos_token_id", "eos_token_id",
    "pad_token_id", "use_sliding_window", "max_window_layers", "layer_types", "original_max_position_embeddings",
    "default_theta",
))  # fmt: skip
"""Fields that do not change outputs, or only through other fields (``max_window_layers`` through ``layer_types``)."""
