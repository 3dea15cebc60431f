"""Which reads bring a layer's neurons to their rows: as few and as large as pays, each scattered by the kernel itself.

Axes: n neurons, P parts of a bundle, r reads, s segments.

A read is one stretch of the file and a list of segments in memory. Neighbours on flash become one read, and so do neurons a small gap
apart: what lies between them goes to a scratch row. All is arithmetic over arrays, because a token asks for thousands of neurons.
Reference: arXiv:2312.11514, 3.2.
"""

import os
from dataclasses import dataclass

import numpy as np

SEGMENT = np.dtype([("address", "<u8"), ("length", "<u8")])
"""The kernel's `struct iovec`."""

MOST_BYTES = 1 << 20  # of one read: beyond this no disk gets faster, and a long read delays those behind it
_MOST_SEGMENTS = os.sysconf("SC_IOV_MAX") if hasattr(os, "sysconf") else 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPlan:
    """Reads from one file.

    Attributes:
      offsets, lengths: [r] int64, the stretches of the file.
      first_segments: [r + 1] int64; read i fills segments[first_segments[i] : first_segments[i + 1]].
      segments: [s] of SEGMENT.
    """

    offsets: np.ndarray
    lengths: np.ndarray
    first_segments: np.ndarray
    segments: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def num_bytes(self) -> int:
        return int(self.lengths.sum())

    def segments_of(self, read: int) -> np.ndarray:
        return self.segments[self.first_segments[read] : self.first_segments[read + 1]]


def plan_rows(offsets: np.ndarray, addresses: np.ndarray, row_bytes: int, *, merge_gap: int = 0, scratch: int = 0) -> ReadPlan:
    """Reads for bundles whose parts go to rows of their own.

    Args:
      offsets: [n] int64, where each bundle begins in the file.
      addresses: [n, P] uint64, where each part goes.
      row_bytes: of a part.
      merge_gap: bundles at most so many bytes apart are read together, as far as they ascend in the file.
      scratch: address of `merge_gap` bytes that anything may be written to.
    """
    count, num_parts = addresses.shape
    stride = num_parts * row_bytes
    gaps = np.zeros(count, np.int64)
    gaps[1:] = np.diff(offsets) - stride
    joined = (gaps >= 0) & (gaps <= merge_gap)
    joined[:1] = False
    starts = _split_runs(joined, max(1, min(MOST_BYTES // (stride + merge_gap), _MOST_SEGMENTS // (num_parts + 1))))
    first = np.flatnonzero(starts)
    last = np.append(first[1:], count) - 1
    segments = np.empty((count, num_parts + 1), SEGMENT)
    segments["address"][:, 0], segments["address"][:, 1:] = scratch, addresses
    segments["length"][:, 0], segments["length"][:, 1:] = np.where(starts, 0, gaps), row_bytes
    flat = segments.reshape(-1)
    used = flat["length"] > 0
    numbers = np.concatenate(([0], np.cumsum(used.reshape(count, -1).sum(axis=1))))
    return ReadPlan(
        offsets=offsets[first].astype(np.int64),
        lengths=(offsets[last] + stride - offsets[first]).astype(np.int64),
        first_segments=numbers[np.append(first, count)],
        segments=flat[used],
    )


def plan_bytes(offset: int, length: int, address: int) -> ReadPlan:
    """Reads for a stretch of a file to one place in memory."""
    starts = np.arange(0, length, MOST_BYTES, dtype=np.int64)
    lengths = np.minimum(MOST_BYTES, length - starts)
    segments = np.empty(len(starts), SEGMENT)
    segments["address"], segments["length"] = address + starts, lengths
    return ReadPlan(offsets=offset + starts, lengths=lengths, first_segments=np.arange(len(starts) + 1), segments=segments)


def _split_runs(joined: np.ndarray, most: int) -> np.ndarray:
    """[n] bool: where reads begin, when neurons that are joined to the one before share its read, up to `most` of them."""
    numbers = np.arange(len(joined))
    run_starts = np.maximum.accumulate(np.where(joined, 0, numbers))
    return ~joined | ((numbers - run_starts) % most == 0)
