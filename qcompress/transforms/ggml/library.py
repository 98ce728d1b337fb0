"""ggml's own encoders and decoders, called in its shared library (the package ``libggml-python``).

ggml ends the whole process when it is misused, so everything is checked before a call. Rows are independent of each
other and ggml's calls release Python's global lock, so several threads share them.
"""

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompress.errors import MissingError, ModelError
from qcompress.transforms.ggml.types import LARGEST, TYPES
from qcompress.transforms.threads import over_rows


class _Traits(ctypes.Structure):
    """The leading fields of ``struct ggml_type_traits``."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def encode(name: str, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Encode rows with ggml; returns ``(channels, bytes of a row)``.

    Args:
        name: name of a type.
        rows: ``(channels, n)``, contiguous; n is a multiple of the type's block.
        importance: ``(n,)`` mean square of each input column, or None to weight all columns equally.

    Raises:
        MissingError: the library is missing.
        ModelError: the rows do not fit, are not finite or exceed float16, or the type needs an importance.

    >>> encode("Q8_0", np.ones((2, 32), np.float32)).shape
    (2, 34)
    """
    kind = TYPES[name]
    channels, length = rows.shape
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if length % kind.block:
        raise ModelError(f"{name} takes rows of a multiple of {kind.block} weights, found {length}")
    if rows.size and not float(np.abs(rows).max()) <= LARGEST:  # also true for NaN
        raise ModelError(f"{name} takes finite weights up to {LARGEST:.0f} in magnitude")
    if importance is not None:
        importance = _weights(importance, length)
    if importance is None and not kind.blind:
        raise ModelError(f"{name} needs the mean squares of the layer's inputs: measure() collects them")
    library = _library()
    library.ggml_quantize_init(kind.number)
    blocks = np.empty((channels, kind.row_bytes(length)), dtype=np.uint8)
    weights = None if importance is None else importance.ctypes.data

    def chunk(start: int, stop: int) -> None:
        library.ggml_quantize_chunk(
            kind.number, rows[start:].ctypes.data, blocks[start:].ctypes.data, 0, stop - start, length, weights
        )

    over_rows(chunk, channels, length)
    return blocks


def decode(name: str, blocks: NDArray[np.uint8], length: int) -> NDArray[np.float32]:
    """Decode blocks ``(channels, bytes of a row)`` with ggml; returns ``(channels, length)``.

    Raises:
        MissingError: the library is missing.
        ModelError: the blocks have another length.

    >>> decode("Q8_0", encode("Q8_0", np.ones((1, 32), np.float32)), 32)[0, :2].round(3).tolist()
    [1.0, 1.0]
    """
    kind = TYPES[name]
    if blocks.shape[1] != kind.row_bytes(length) or length % kind.block:
        raise ModelError(f"{length} weights of {name} take {kind.row_bytes(length)} bytes, found {blocks.shape[1]}")
    blocks = np.ascontiguousarray(blocks)
    if name == "F32":
        return blocks.view(np.float32)
    library = _library()
    library.ggml_quantize_init(kind.number)  # creates tables that some types need for decoding
    to_float = library.ggml_get_type_traits(kind.number).contents.to_float
    rows = np.empty((len(blocks), length), dtype=np.float32)

    def chunk(start: int, stop: int) -> None:
        to_float(blocks[start:].ctypes.data, rows[start:].ctypes.data, (stop - start) * length)

    over_rows(chunk, len(blocks), length)
    return rows


def _weights(importance: NDArray[np.float32], length: int) -> NDArray[np.float32] | None:
    """Normalise the importance for ggml: finite, of mean 1, nowhere 0; None if it is 0 everywhere.

    Raises:
        ModelError: it has another length, is negative or not finite.
    """
    wide = np.asarray(importance, dtype=np.float64)
    if wide.shape != (length,) or not np.isfinite(wide).all() or (wide < 0).any():
        raise ModelError(f"the importance of columns must be {length} finite numbers that are not negative")
    mean = wide.mean()
    return np.ascontiguousarray(np.maximum(wide / mean, 1e-6), dtype=np.float32) if mean > 0 else None


@functools.cache
def _library() -> Any:
    spec = importlib.util.find_spec("libggml")
    if spec is None or spec.origin is None:
        raise MissingError("ggml's types need libggml-python: pip install 'qcompress[gguf]'")
    files = sorted(Path(spec.origin).parent.glob("lib*/*ggml-base.*"))  # .so, .dylib or .dll
    if not files:
        raise MissingError(f"there is no ggml library in {Path(spec.origin).parent}: reinstall libggml-python")
    library = ctypes.CDLL(str(files[0]))
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    ]  # fmt: skip
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    return library
