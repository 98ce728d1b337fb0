"""Loops over packed codes, see `qcompress.compressed.rows`; a separate module because numba is slow to import."""

import numba

from solvers.kernels.compiled import compiled


@numba.njit(inline="always")
def _code_at(packed, number, bits):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Return code ``number`` of ``bits`` bits, at most 16; it spans at most three bytes. Beyond the last one: 0."""
    first = number * bits
    byte, value = first >> 3, numba.uint32(0)
    if byte + 2 < packed.shape[0]:
        value = numba.uint32(packed[byte]) | numba.uint32(packed[byte + 1]) << 8 | numba.uint32(packed[byte + 2]) << 16
    else:
        for b in range(packed.shape[0] - byte):
            value |= numba.uint32(packed[byte + b]) << numba.uint32(8 * b)
    return numba.int32(value >> (first & 7) & ((1 << bits) - 1))


@compiled
def decode(codes, bits, numbers, scales, zeros, group_size, decoded):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Decode rows: ``decoded[i, j] = (code - zero)·scale`` for row ``numbers[i]``, scale and zero of j's group."""
    columns, low = decoded.shape[1], (1 << bits) - 1
    for i in range(numbers.shape[0]):
        place, row = numbers[i] * columns, decoded[i]
        for group in range(scales.shape[1]):
            scale, zero = scales[i, group], zeros[i, group]
            j, stop = group * group_size, min((group + 1) * group_size, columns)
            whole = bits <= 8
            while j < stop and not (whole and (place + j) % 8 == 0):
                row[j] = numba.float32(_code_at(codes, place + j, bits) - zero) * scale
                j += 1
            while j + 8 <= stop:  # eight codes fill `bits` bytes
                byte = (place + j) // 8 * bits
                word = numba.uint64(0)
                for b in range(bits):
                    word |= numba.uint64(codes[byte + b]) << numba.uint64(8 * b)
                for c in range(8):
                    row[j + c] = numba.float32(numba.int32(word >> numba.uint64(bits * c) & low) - zero) * scale
                j += 8
            while j < stop:
                row[j] = numba.float32(_code_at(codes, place + j, bits) - zero) * scale
                j += 1


@compiled
def decode_kept(codes, mask, before, bits, numbers, scales, zeros, group_size, decoded):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Like `decode`, but only weights in the mask have a code; ``before`` counts those of all previous rows."""
    columns = decoded.shape[1]
    for i in range(numbers.shape[0]):
        place, code, row = numbers[i] * columns, before[i], decoded[i]
        for group in range(scales.shape[1]):
            scale, zero = scales[i, group], zeros[i, group]
            for j in range(group * group_size, min((group + 1) * group_size, columns)):
                kept = numba.int64(mask[(place + j) >> 3] >> ((place + j) & 7) & 1)
                row[j] = (
                    numba.float32(kept * (_code_at(codes, code, bits) - zero)) * scale
                )  # without a branch, which would be mispredicted
                code += kept
