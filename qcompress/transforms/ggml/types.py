"""ggml's tensor types: number in a GGUF file, weights and bytes per block, and fallback for rows that do not fit.

A row is cut into blocks, so its length must be a multiple of the block's. Source: ``ggml.h`` and ``ggml-common.h`` of
https://github.com/ggml-org/ggml; a test compares the table with the package ``gguf``.
"""

from dataclasses import dataclass

LARGEST = 65504.0  # the largest float16, in which most formats keep their scales


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """One of ggml's types.

    Attributes:
        number: number of the type in a GGUF file.
        block: number of weights in a block.
        block_bytes: bytes of a block.
        weighted: whether its encoder uses the mean squares of the inputs.
        blind: whether its encoder works without them.
        fallback: the type that llama.cpp uses for rows that are not a multiple of the block, or an empty string.
    """

    number: int
    block: int
    block_bytes: int
    weighted: bool = True
    blind: bool = True
    fallback: str = ""

    def row_bytes(self, length: int) -> int:
        """Return the bytes of a row of ``length`` weights, a multiple of the block."""
        return length // self.block * self.block_bytes


def _small(number: int, block_bytes: int, *, weighted: bool = True) -> TensorType:
    return TensorType(number=number, block=32, block_bytes=block_bytes, weighted=weighted)


def _large(number: int, block_bytes: int, fallback: str, *, blind: bool = True) -> TensorType:
    return TensorType(number=number, block=256, block_bytes=block_bytes, fallback=fallback, blind=blind)


COMPENSATED = (
    "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K",
)  # fmt: skip
"""Types whose codes can be chosen here (`qcompress.transforms.ggml.codes`): offset plus scale times a table value."""

TYPES = {
    "F32": TensorType(number=0, block=1, block_bytes=4, weighted=False),
    "F16": TensorType(number=1, block=1, block_bytes=2, weighted=False),
    "BF16": TensorType(number=30, block=1, block_bytes=2, weighted=False),
    "Q8_0": _small(8, 34, weighted=False),
    "Q5_1": _small(7, 24),
    "Q5_0": _small(6, 22),
    "Q4_1": _small(3, 20),
    "Q4_0": _small(2, 18),
    "IQ4_NL": _small(20, 18),
    "MXFP4": _small(39, 17, weighted=False),
    "Q6_K": _large(14, 210, "Q8_0"),
    "Q5_K": _large(13, 176, "Q5_1"),
    "Q4_K": _large(12, 144, "Q5_0"),
    "IQ4_XS": _large(23, 136, "IQ4_NL"),
    "Q3_K": _large(11, 110, "IQ4_NL"),
    "IQ3_S": _large(21, 110, "IQ4_NL"),
    "IQ3_XXS": _large(18, 98, "IQ4_NL"),
    "Q2_K": _large(10, 84, "IQ4_NL"),
    "IQ2_S": _large(22, 82, "IQ4_NL"),
    "IQ2_XS": _large(17, 74, "IQ4_NL", blind=False),
    "IQ2_XXS": _large(16, 66, "IQ4_NL", blind=False),
    "IQ1_M": _large(29, 56, "IQ4_NL", blind=False),
    "IQ1_S": _large(19, 50, "IQ4_NL", blind=False),
}
