"""Families of options that engines bring with them: products in integers, and the tensor types of ggml."""

from collections.abc import Iterable

from qcompress.errors import OptionsError
from qcompress.options.base import Options
from qcompress.options.families import listed
from qcompress.transforms.ggml.gguf_type import GgufType
from qcompress.transforms.ggml.types import TYPES
from qcompress.transforms.quantize.integer import BITS, IntegerProduct

RANGES = ("static", "dynamic")


def integer_products(
    ranges: Iterable[str] = RANGES, *, bits: Iterable[int] = (8,), compensated: bool = False
) -> Options:
    """Weights and activations in 8 bits (W8A8), multiplied as integers where an engine has kernels for that.

    Weights are stored in 8 bits by row. The input of a Linear layer or convolution is rounded to 8 bits at run time,
    and so is the output of a convolution; fold batch norms first (`fold_batch_norms`), so that this output is what the
    next layer reads. The rounding is included in the measured loss of the option and in the model that `apply` returns.

    Args:
        ranges: ``"static"`` for ranges from the calibration data, ``"dynamic"`` for the range of each tensor at run
            time (Linear layers only; all samples of a batch then share one range).
        bits: bits of the weights. 7 is for convolutions that read several channels, with static ranges: on x86
            processors without VNNI, ONNX Runtime multiplies them faster.
        compensated: same as in `prune_quantize`, for the weights.

    Raises:
        OptionsError: a list is empty, or contains something else.

    >>> integer_products()
    Options(8 bits, activations in 8 bits; 8 bits, activations in 8 bits, dynamic)
    >>> integer_products(("static",), bits=(8, 7))
    Options(8 bits, activations in 8 bits; 7 bits, activations in 8 bits)
    """
    words = listed(ranges, "ranges", "('static', 'dynamic')")
    if wrong := [word for word in words if word not in RANGES]:
        raise OptionsError(f"ranges are {' and '.join(map(repr, RANGES))}, found {wrong[0]!r}")
    pairs = [(word, width) for width in listed(bits, "bits", "(8, 7)") for word in words]
    if not (offered := [(word, width) for word, width in pairs if width == max(BITS) or word == "static"]):
        raise OptionsError("weights of 7 bits need ranges of the calibration data: give ranges=('static',)")
    return Options(tuple(IntegerProduct(width, word == "dynamic", compensated) for word, width in offered))


RARE_TYPES = ("F32", "BF16", "IQ1_M", "IQ1_S")


def gguf_types(names: Iterable[str] | None = None, *, compensated: bool = False) -> Options:
    """Tensor types of ggml, encoded by ggml itself, as run by llama.cpp.

    `measure` collects the mean squares of the layers' inputs, which weigh the columns like llama.cpp's importance
    matrix. If the row length is not a multiple of a type's block, the type that llama.cpp falls back to is offered.

    Args:
        names: type names, such as ``("Q4_K", "Q6_K")``; by default F16 and all quantized types down to 2 bits.
        compensated: whether codes, scales and offsets are adjusted to compensate each other's errors on the calibration
            inputs, in the same bytes. This covers all types except F16, BF16 and those of 1 to 3 bits whose names begin
            with IQ, which stay as ggml encodes them. llama.cpp needs no change. `measure` then stores ``(in, in)``
            second moments of each such layer; for an embedding tied to the output layer, those of the latter's input.

    Raises:
        OptionsError: the list is empty, or a type does not exist; the message lists the known ones.

    >>> gguf_types(("Q4_K", "Q8_0"))
    Options(Q4_K; Q8_0)
    """
    if names is None:
        names = [name for name in TYPES if name not in RARE_TYPES]
    return Options(tuple(GgufType(name, compensated) for name in listed(names, "names", "('Q4_K', 'Q6_K')")))
