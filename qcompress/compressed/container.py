"""Write and read the contents of a compressed model as a safetensors file.

One array of bytes holds all arrays in sequence, and one entry of the metadata describes them, because a separate entry
for each array would take more space than the small arrays themselves.
"""

import json
import zlib
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from formulations import FileFormatError
from formulations.file_kinds import FileKind
from formulations.files import AnyPath, as_path
from qcompress.compressed.index import Contents, pack_index, unpack_index
from qcompress.compressed.record import CompressedPart
from qcompress.errors import ArtefactError
from qcompress.model.loose import loose_state
from qcompress.model.tensors import EXTRA_STATE, bytes_of, held_tensors

FILE_KIND = FileKind("qcompress compressed model", version=3)
_HEADER = "qcompress"
_PAYLOAD = "payload"

_DAMAGE = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, zlib.error)


def head(contents: Contents, digest: str) -> bytes:
    """Return everything before the arrays; its length depends neither on the arrays' values nor on the digest.

    Args:
        contents: contents of the file.
        digest: digest of the model, 64 characters.
    """
    crc32 = 0
    for array in contents.arrays:
        crc32 = zlib.crc32(bytes_of(array), crc32)
    header = {
        **FILE_KIND.header, "crc32": f"{crc32:08x}", "digest": digest,
        "index": pack_index(contents),
    }  # fmt: skip
    size = contents.payload_bytes
    value = {
        "__metadata__": {_HEADER: json.dumps(header, separators=(",", ":"))},
        _PAYLOAD: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    text = json.dumps(value, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned for any type
    return len(text).to_bytes(8, "little") + text


def read(path: AnyPath) -> tuple[Contents, str]:
    """Return the contents of a file, and the digest of the saved model.

    Raises:
        FileNotFoundError: the file does not exist.
        ArtefactError: it is not a complete file of this kind.
    """
    metadata, tensors = _read(path)
    if _HEADER not in metadata:
        raise ArtefactError(f"{path} is a safetensors file, but not a {FILE_KIND.name}: it has no {_HEADER!r} header")
    try:
        header = json.loads(metadata[_HEADER])
        FILE_KIND.require(header, path)
    except json.JSONDecodeError as error:
        raise ArtefactError(f"{path} is damaged: no readable header in it ({error!r})") from error
    except FileFormatError as error:
        raise ArtefactError(str(error)) from error
    if header.get("crc32") != f"{_checksum(tensors):08x}":
        raise ArtefactError(f"{path} is damaged: its arrays do not have the checksum they were written with")
    try:
        contents, digest = unpack_index(header["index"], tensors[_PAYLOAD]), str(header["digest"])
        for item in contents.parts:
            _require_size(item)
    except _DAMAGE as error:
        raise ArtefactError(f"{path} is damaged: its header does not fit its arrays ({error!r})") from error
    return contents, digest


def require_tensors(model: nn.Module) -> None:
    """Check that a file can hold the state of a model.

    Raises:
        ArtefactError: a module has extra state that is not a tensor, a tensor is sparse, or a parameter is in a plain
            attribute.
    """
    if loose := loose_state(model):
        raise ArtefactError(
            f"{loose[0]!r} is a parameter or buffer that PyTorch does not see, in a plain attribute, list, dict or "
            "object: no file can hold it. Use nn.ParameterList, nn.ParameterDict, register_parameter or register_buffer"
        )
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extra = module.get_extra_state()
            if not isinstance(extra, Tensor):
                name = f"{path}.{EXTRA_STATE}" if path else EXTRA_STATE
                raise ArtefactError(
                    f"the state dict's {name!r} is {type(extra).__name__}, not a tensor: it cannot be stored"
                )
    for item in held_tensors(model):
        if item.tensor.layout != torch.strided:
            raise ArtefactError(f"{item.name!r} is a sparse tensor, which cannot be stored: convert it to a dense one")


def _read(path: AnyPath) -> tuple[dict[str, str], dict[str, Tensor]]:
    if as_path(path).is_dir():
        raise ArtefactError(
            f"{path} is a folder, but a compressed model is one file, such as model.safetensors in the folder of a run"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        with Path(path).open("rb") as file:
            start = file.read(8)  # in a safetensors file, the length of the header, which ends in zeros
        if start[:2] == b"PK" or (start[:1] == b"\x80" and any(start[2:])):
            raise ArtefactError(
                f"{path} is a pickle (as torch.save writes), which is never loaded; give a file of save_compressed()"
            ) from error
        raise ArtefactError(
            f"{path} is not a complete compressed model: truncated, damaged or of another kind ({error})"
        ) from error


def _checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 over the bytes of all tensors, by name."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(bytes_of(tensors[name]), value)
    return value


def _require_size(item: CompressedPart) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in item.stored.values())
    expected = item.transform.size_bytes(item.part.target)
    if size != expected:
        raise ValueError(f"{item.part.name!r} has {size} bytes, {item.transform.label} takes {expected}")
