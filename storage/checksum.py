"""CRC32C of neurons and shard indexes, by numcodecs (which uses the processor's instruction)."""

from collections.abc import Sequence

import numpy as np
from numcodecs.checksum32 import CRC32C

_CODEC = CRC32C(location="end")


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """The CRC32C of contiguous bytes, unsigned."""
    return int(CRC32C.checksum(np.frombuffer(data, np.uint8)))


def bundle_checksums(bundles: np.ndarray) -> np.ndarray:
    """One checksum a bundle: [n, P, D] of any dtype to [n] uint32."""
    rows = np.ascontiguousarray(bundles).reshape(len(bundles), -1).view(np.uint8)
    return np.fromiter((crc32c(row) for row in rows), np.uint32, len(rows))


def joined_checksum(parts: Sequence[np.ndarray]) -> int:
    """The checksum of one bundle whose rows lie apart in memory."""
    return crc32c(np.concatenate([part.view(np.uint8) for part in parts]))
