"""Metadata of a ``.bqm`` or ``.qubo`` file: how its bits encode choices.

A ``.bqm`` file stores the metadata as an extra entry of its header, a ``.qubo`` file as a comment, so other programs
can still read both. Invariant: energies in the file are those of the model times ``scale``, a power of two, so that the
largest bias is at most 1 and no digit is lost.
"""

import io
import json
import math
import struct
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from formulations.errors import EncodingError, FileFormatError
from formulations.file_kinds import FileKind
from formulations.files import AnyPath
from formulations.forms.couplings import Integers
from formulations.forms.tight_budgets import tight_budgets
from formulations.forms.use_levels import in_levels, levels_for
from formulations.problem import Problem

if TYPE_CHECKING:
    from formulations.forms.bqm import EncodedBqm

FILE_KIND = FileKind("qcompress bits", version=1)

COMMENT = "c decode "
"""Prefix of the line of a ``.qubo`` file that holds the metadata, a JSON object."""

LARGEST_POWER = sys.float_info.max_exp - 1
"""Exponent of the largest power of two among floats; costs below about 1e-308 are scaled by it."""

MAGIC = b"DIMODBQM"
ENTRY = "qcompress"
"""Entry of a ``.bqm`` file's header that holds the metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bits:
    """How a problem was encoded in bits.

    Attributes:
        problem_fingerprint: fingerprint of the problem.
        encoding, prices, overrun: arguments of `formulations.to_bqm`; with ``levels``, prices and overrun count levels.
        levels: argument of `formulations.forms.use_levels.in_levels`, or None if uses are not rounded to levels.
        scale: factor by which energies were multiplied.
    """

    problem_fingerprint: str
    encoding: str
    prices: Mapping[str, float] | None
    overrun: Mapping[str, float] | None
    levels: int | None
    scale: float

    def encoded(self, problem: Problem) -> "EncodedBqm":
        """Encode ``problem`` in the same way; energies are not scaled.

        Raises:
            FileFormatError: ``problem`` is not the problem that was encoded.
        """
        from formulations.forms.bqm import to_bqm

        if problem.fingerprint() != self.problem_fingerprint:
            raise FileFormatError("the file holds the bits of another problem")
        counted = problem if self.levels is None else in_levels(problem, self.levels)
        return to_bqm(counted, self.encoding, prices=self.prices, overrun=self.overrun)

    def to_json(self) -> dict[str, Any]:
        """Return the metadata as plain JSON."""
        return {**FILE_KIND.header, **asdict(self)}


def refuse_paired_budgets(problem: Problem, what: str) -> None:
    """Refuse budgets whose resource has pair terms, for a kind of file ``what``.

    Raises:
        EncodingError: there are such budgets; the message names them.
    """
    if problem.paired_budgets:
        raise EncodingError(
            f"{what} holds no pair terms in a budget, this problem has some in {', '.join(problem.paired_budgets)}; "
            "write an .npz file"
        )


def in_bits(
    problem: Problem, encoding: str, prices: Mapping[str, float] | None, *, proven: bool
) -> tuple["EncodedBqm", Bits]:
    """Encode a problem for a file, with tight budgets unless prices are given or a proof is asked for.

    Returns:
        The model and the metadata for its file.

    Raises:
        EncodingError: a budget has pair terms, the model has no bit; or see `formulations.to_bqm`.
    """
    from formulations.forms.bqm import to_bqm

    refuse_paired_budgets(problem, "a file of bits")
    overrun, levels, counted = None, None, problem
    if prices is None and not proven:
        levels = levels_for(problem)
        tight = tight_budgets(problem, levels)
        counted, prices, overrun = tight.problem, tight.prices, tight.overrun
    encoded = to_bqm(counted, encoding, prices=prices, overrun=overrun)
    if not encoded.bqm.num_variables:
        raise EncodingError(
            f"encoding {encoding!r} has no bit for this problem, because every group has a single option: "
            "write an .npz, .lp or .mps file, or use encoding 'one-hot'"
        )
    linear, (_, _, couplings), _ = encoded.bqm.to_numpy_vectors()
    largest = max(np.abs(linear).max(initial=0.0), np.abs(couplings).max(initial=0.0))
    return encoded, Bits(
        problem_fingerprint=problem.fingerprint(),
        encoding=encoding,
        prices=None if prices is None else dict(prices),
        overrun=None if overrun is None else dict(overrun),
        levels=levels,
        scale=2.0 ** min(-math.ceil(math.log2(largest)), LARGEST_POWER) if largest > 0 else 1.0,
    )


def decode_bits(path: AnyPath, problem: Problem, samples: ArrayLike) -> Integers:
    """Decode samples of a file's bits into choices, some of which may exceed a budget (see `Problem.evaluate`).

    Args:
        path: a ``.bqm`` or ``.qubo`` file that was written from ``problem``.
        problem: the problem.
        samples: ``(n, variables)`` values 0 and 1 in the order of the file's variables.

    Raises:
        FileFormatError: the file has no metadata, or was written from another problem.
        EncodingError: the samples have another shape, or other values.

    >>> import pathlib, tempfile
    >>> from formulations import write_qubo
    >>> problem = Problem(["a", "b"], [["keep", "4 bit"]] * 2, [0, 3, 0, 1], {"bytes": [8, 4, 8, 4]}, {"bytes": 12})
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "problem.qubo"
    >>> write_qubo(problem, file, encoding="one-hot")
    >>> decode_bits(file, problem, [[1, 0, 0, 1, 0]]).tolist()
    [[0, 1]]
    """
    bits = metadata_in(path)
    if bits is None:
        raise FileFormatError(f"{path} does not say how its bits are to be decoded: it was not written by qcompress")
    from formulations.forms.bqm import as_bits

    return bits.encoded(problem).decode_all(as_bits(samples))


def metadata_in(path: AnyPath) -> Bits | None:
    """Read a file's metadata; None if another program wrote the file.

    Raises:
        FileFormatError: the metadata is of another version, damaged or incomplete.
    """
    with Path(path).open("rb") as file:
        try:
            return metadata_of(file, str(path))
        except FileFormatError:
            raise
        except (ValueError, struct.error) as error:
            raise FileFormatError(f"{path} holds no readable metadata: {error}") from error


def metadata_of(file: IO[bytes], where: str) -> Bits | None:
    """Read the metadata of an open file; see `metadata_in`."""
    if file.read(len(MAGIC)) == MAGIC:
        _, header = _header(file)
        metadata = header.get(ENTRY)
    else:
        file.seek(0)
        lines = (line.lstrip() for line in file if line.lstrip().startswith(f"{COMMENT}{{".encode()))
        line = next(lines, None)
        metadata = None if line is None else json.loads(line.removeprefix(COMMENT.encode()))
    if metadata is None:
        return None
    content = FILE_KIND.content(metadata, where)
    with FILE_KIND.building(where):
        return Bits(**content)


def with_entry(model: bytes, bits: Bits) -> bytes:
    """Return the bytes of a BQM file with the metadata added to its header, padded as dimod pads it."""
    file = io.BytesIO(model)
    file.read(len(MAGIC))
    version, header = _header(file)
    text = json.dumps({**header, ENTRY: bits.to_json()}).encode("ascii") + b"\n"
    before = len(MAGIC) + 6
    text += b" " * (-(before + len(text)) % 64)
    return MAGIC + version + struct.pack("<I", len(text)) + text + model[file.tell() :]


def _header(file: IO[bytes]) -> tuple[bytes, dict[str, Any]]:
    """Read version and header of a BQM file, starting after the magic word."""
    version = file.read(2)
    (length,) = struct.unpack("<I", file.read(4))
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"the header is {header!r:.40}, not an object")
    return version, header
